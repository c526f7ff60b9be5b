"""The moving average of the weights."""

import json
import math

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from dn_detr.d2.engine.checkpoint import Checkpointer
from dn_detr.d2.engine.ema import MovingAverage
from dn_detr.errors import InputError


def test_an_update_is_the_formula_of_the_configuration_key():
    model = nn.BatchNorm1d(1)
    average = MovingAverage(model, decay=0.9, warmup=2.0)
    expected = {"weight": 1.0, "running_mean": 0.0}
    for update in (1, 2, 3):
        model.weight.data.fill_(10.0 * update)
        model.running_mean.fill_(-4.0 * update)
        model.num_batches_tracked.fill_(update)
        average.update(model)
        kept = 0.9 * (1 - math.exp(-update / 2))
        expected["weight"] = kept * expected["weight"] + (1 - kept) * 10.0 * update
        expected["running_mean"] = kept * expected["running_mean"] - (1 - kept) * 4.0 * update
    for name, value in expected.items():
        assert average.model.state_dict()[name].item() == pytest.approx(value, rel=1e-6), name
    assert average.model.num_batches_tracked == 3  # a counter has no average


def test_without_warmup_the_decay_holds_from_the_first_update():
    model = nn.Linear(1, 1)
    average = MovingAverage(model, decay=0.75, warmup=0)
    before = model.weight.item()
    model.weight.data.add_(4.0)
    average.update(model)
    assert average.model.weight.item() == pytest.approx(before + 1.0)


@pytest.mark.parametrize("key", [{"decay": 1.0, "warmup": 0}, {"decay": 0.5, "warmup": -1}])
def test_a_decay_that_never_moves_and_a_negative_warmup_are_refused(key):
    with pytest.raises(InputError, match="SOLVER.EMA.DECAY must be in"):
        MovingAverage(nn.Linear(1, 1), **key)


EMA = ("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5, "SOLVER.EMA.WARMUP", 0)


def test_both_weights_are_evaluated_saved_and_can_be_evaluated_alone(run, tmp_path, tiny_config):
    run(*EMA, "TEST.EVAL_PERIOD", 2)
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.json").read_text().splitlines()]
    evaluated = [line for line in lines if "bbox/AP50" in line]
    assert len(evaluated) == 2 and all("ema/bbox/AP50" in line for line in evaluated)
    path = tmp_path / "run" / "model_final.pth"
    saved = torch.load(path)
    assert saved["ema"]["updates"] == 3
    for weights in ("", "@ema"):
        model = build_model(tiny_config())
        Checkpointer(model).load(f"{path}{weights}", checkpointables=[])
        wanted = saved["ema"]["model"] if weights else saved["model"]
        assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
        run(
            "MODEL.WEIGHTS",
            f"{path}{weights}",
            flags=["--eval-only"],
            output=f"alone{weights}",
        )
    for alone, during in (("alone", "run"), ("alone@ema", "run/ema")):
        one, other = (
            json.loads((tmp_path / folder / "inference/coco_instances_results.json").read_text())
            for folder in (alone, during)
        )
        assert one == other


def test_a_resume_starts_an_average_that_the_checkpoint_lacks_from_its_weights(run, tmp_path):
    run("SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 0)
    first = torch.load(tmp_path / "run" / "model_final.pth")["model"]
    run(*EMA, flags=["--resume"])
    last = torch.load(tmp_path / "run" / "model_final.pth")
    for name, value in last["ema"]["model"].items():
        if value.is_floating_point():
            middle = (first[name] + last["model"][name]) / 2
            torch.testing.assert_close(value, middle, rtol=1e-5, atol=1e-7)


def test_an_average_that_was_not_kept_cannot_be_read(run, tmp_path):
    run()
    with pytest.raises(SystemExit, match="holds no moving average of the weights"):
        run("MODEL.WEIGHTS", tmp_path / "run/model_final.pth@ema", flags=["--eval-only"])
