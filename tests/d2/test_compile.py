"""The compiled core: the same config, one graph, few compilations."""

import pytest
import torch
from detectron2.modeling import build_model
from samples import sample
from torch._dynamo.utils import counters

from dn_detr.d2.engine.compile import compile_core


@pytest.fixture(autouse=True)
def from_nothing():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def models(cfg, backend):
    torch.manual_seed(0)
    plain = build_model(cfg)
    torch.manual_seed(0)
    model = build_model(cfg)
    compile_core(model.core, backend)
    return plain, model


def losses_and_gradients(model, batch):
    model.zero_grad()
    losses = model(batch, iteration=0)
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


BUCKETS = ("MODEL.DN_DETR.PAD_OBJECTS_TO", 4, "MODEL.DN_DETR.DENOISING.NUM_GROUPS", 2)


def test_fifty_steps_of_changing_numbers_of_objects_compile_at_most_three_times(tiny_config):
    plain, model = models(tiny_config(*BUCKETS), "eager")
    for step in range(50):
        batch = [sample(step, step * 7 % 13), sample(100 + step, step % 3)]
        losses = model(batch, iteration=step)
        if step % 10 == 0:
            for name, loss in plain(batch, iteration=step).items():
                torch.testing.assert_close(losses[name], loss, msg=name)
    assert not counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


def test_the_compiled_backward_pass_gives_the_same_gradients(tiny_config):
    plain, model = (one.double() for one in models(tiny_config(*BUCKETS), "aot_eager"))
    batch = [sample(0, 3), sample(1, 1)]
    expected, found = losses_and_gradients(plain, batch), losses_and_gradients(model, batch)
    for name, loss in expected[0].items():
        torch.testing.assert_close(found[0][name], loss, msg=name)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-8, atol=1e-12, msg=name)
    assert not counters["graph_break"]


def test_evaluation_is_not_compiled(tiny_config):
    _, model = models(tiny_config(), "eager")
    with torch.no_grad():
        model.eval()([sample(0, 0)])
    assert counters["stats"]["unique_graphs"] == 0


def test_a_training_takes_the_key_and_saves_under_the_same_names(run, tmp_path):
    run("MODEL.DN_DETR.COMPILE", "eager", "SOLVER.MAX_ITER", 2)
    assert counters["stats"]["unique_graphs"] >= 1
    weights = tmp_path / "run" / "model_final.pth"
    run("MODEL.WEIGHTS", weights, flags=["--eval-only"], output="evaluation")


def test_with_activation_checkpointing_too(run):
    run(
        *("MODEL.DN_DETR.COMPILE", "aot_eager", "SOLVER.MAX_ITER", 2),
        *("MODEL.DN_DETR.RECOMPUTE", "['encoder', 'decoder']"),
    )
    assert not counters["graph_break"]


def test_an_unknown_backend_is_refused(run):
    with pytest.raises(SystemExit, match="a backend of torch.compile, .*inductor.* got 'fast'"):
        run("MODEL.DN_DETR.COMPILE", "fast")
