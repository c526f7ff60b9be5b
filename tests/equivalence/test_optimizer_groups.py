"""Learning rate and weight decay of every parameter, beside the authors' optimizers."""

from __future__ import annotations

import pytest
import torch
from published import PUBLISHED, Authors, our_config, under_our_names
from table import record

pytest.importorskip("detectron2")
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer as build_optimizer_of_detectron2

from dn_detr.d2.solver.optimizer import build_optimizer

FROZEN = (0.0, 0.0)


def rates_and_decays(optimizer) -> dict[torch.nn.Parameter, tuple[float, float]]:
    """Parameter -> learning rate and weight decay."""
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert parameter not in found
            found[parameter] = (float(group["lr"]), float(group["weight_decay"]))
    return found


def by_name(model, optimizer) -> dict[str, tuple[float, float]]:
    found = rates_and_decays(optimizer)
    return {name: found.get(p, FROZEN) for name, p in model.named_parameters()}


def compare(ours: dict, theirs: dict) -> None:
    differing = {
        name: (pair, theirs.get(name))
        for name, pair in ours.items()
        if theirs.get(name) != pytest.approx(pair, rel=1e-9)
    }
    print(f"{len(ours)} parameters, pairs {sorted(set(ours.values()))}, differing {len(differing)}")
    assert not differing, differing


def settings(optimizer) -> tuple:
    return isinstance(optimizer, torch.optim.AdamW), *(
        optimizer.defaults[key] for key in ("betas", "eps", "amsgrad", "maximize")
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_rate_and_decay_of_every_parameter_are_the_authors(authors, monkeypatch, name):
    """Carried over by the converter: in place of values, the number of the pair."""
    published = PUBLISHED[name]
    program = Authors(published, authors(published.repository), monkeypatch)
    model = program.model()
    optimizer = program.optimizer(model)
    found = rates_and_decays(optimizer)
    pairs = sorted({FROZEN, *found.values()})
    numbers = {id(p): pairs.index(found.get(p, FROZEN)) + 1 for p in model.parameters()}
    state = {
        name: torch.full_like(tensor, numbers.get(id(tensor), 0), dtype=torch.float32)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    cfg = our_config(name, published.num_classes)
    theirs = {
        name: pairs[int(tensor.max()) - 1]
        for name, tensor in under_our_names(cfg.MODEL.DN_DETR.METHOD, state).items()
    }
    our_model = build_model(cfg)
    ours = build_optimizer(cfg, our_model)
    compare(by_name(our_model, ours), theirs)
    record(name, "optimizer groups", 0.0)
    assert settings(ours) == settings(optimizer)
    assert cfg.SOLVER.CLIP_GRADIENTS.ENABLED
    assert cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "full_model"
    assert pytest.approx(program.largest_norm()) == cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE


@pytest.mark.parametrize("name", ["faster_rcnn_fpn", "dn_faster_rcnn_fpn"])
def test_rate_and_decay_of_faster_rcnn_are_detectron2s(name):
    cfg = our_config(name, 80)
    model = build_model(cfg)
    theirs, ours = build_optimizer_of_detectron2(cfg, model), build_optimizer(cfg, model)
    compare(by_name(model, ours), by_name(model, theirs))
    for key in ("momentum", "dampening", "nesterov"):
        assert ours.defaults[key] == theirs.defaults[key]
