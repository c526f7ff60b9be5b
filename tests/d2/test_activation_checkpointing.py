"""Activation checkpointing: the same numbers with less memory."""

import copy
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from samples import sample
from torch import nn

from dn_detr.d2.engine.activation_checkpointing import blocks, recompute
from dn_detr.errors import InputError
from dn_detr.methods import METHODS

QUICK = Path(__file__).resolve().parents[2] / "configs" / "quick"
BATCH = [sample(0, 3), sample(1, 1, height=96, width=64)]


def step(model) -> tuple[dict, dict, int]:
    """Losses, gradients and the bytes that the forward pass keeps for the backward pass."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(BATCH)
        total = sum(losses.values())
        num_bytes = sum(kept.values())
    total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return losses, gradients, num_bytes


def both(cfg, parts):
    torch.manual_seed(0)
    plain = build_model(cfg)
    model = copy.deepcopy(plain)
    recompute(model, parts)
    return plain, model


@pytest.mark.parametrize("part", ["backbone", "encoder", "decoder"])
def test_each_part_gives_the_same_losses_and_gradients_with_less_memory(tiny_config, part):
    cfg = tiny_config(
        *("MODEL.DN_DETR.DROPOUT", 0.1, "MODEL.DN_DETR.ENCODER_LAYERS", 2),
        *("MODEL.DN_DETR.DECODER_LAYERS", 4, "MODEL.DN_DETR.NUM_QUERIES", 100),
    )
    plain, model = both(cfg, [part])
    assert list(model.state_dict()) == list(plain.state_dict())
    expected, found = step(plain), step(model)
    assert found[2] < 0.95 * expected[2]
    for name, loss in expected[0].items():
        assert torch.equal(loss, found[0][name]), name
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
    for name, value in plain.state_dict().items():  # running statistics have moved once, not twice
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith("mask")])
def test_every_method_of_boxes_can_be_computed_again(tiny_config, method):
    plain, model = both(
        tiny_config("MODEL.DN_DETR.METHOD", method), ["backbone", "encoder", "decoder"]
    )
    expected, found = step(plain), step(model)
    assert found[2] < 0.8 * expected[2]
    assert all(torch.equal(loss, found[0][name]) for name, loss in expected[0].items())


@pytest.mark.parametrize("name", ["dn_mask2former", "mask_dino", "prompted_dn_deformable"])
def test_detectors_with_masks_and_known_objects_can_be_computed_again(tiny_config, name):
    cfg = tiny_config(config_file=QUICK / f"{name}.yaml")
    plain, model = both(cfg, ["backbone", "encoder", "decoder"])
    expected, found = step(plain), step(model)
    assert found[2] < 0.95 * expected[2]
    assert all(torch.equal(loss, found[0][name]) for name, loss in expected[0].items())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_a_copy_has_weights_of_its_own(tiny_config):
    _, model = both(tiny_config(), ["encoder"])
    other = copy.deepcopy(model)
    before = [loss.item() for loss in model(BATCH, iteration=0).values()]
    for parameter in other.core.encoder.parameters():
        parameter.data.zero_()
    assert [loss.item() for loss in model(BATCH, iteration=0).values()] == before


def test_blocks_are_what_consists_of_modules_in_sequences():
    block = nn.ModuleDict({"a": nn.Linear(1, 1)})
    stage = nn.Sequential(copy.deepcopy(block), copy.deepcopy(block))
    backbone = nn.ModuleDict(
        {"stem": nn.Sequential(nn.Linear(1, 1), nn.ReLU()), "stages": nn.ModuleList([stage, block])}
    )
    assert list(blocks(backbone)) == [stage[0], stage[1], block]


def test_unknown_parts_are_refused(run):
    with pytest.raises(SystemExit, match=r"RECOMPUTE must hold names of .*, got \['neck'\]"):
        run("MODEL.DN_DETR.RECOMPUTE", "['neck']")


def test_a_backbone_without_blocks_is_refused():
    model = nn.ModuleDict({"backbone": nn.Linear(1, 1)})
    with pytest.raises(InputError, match="this backbone has no blocks"):
        recompute(model, ["backbone"])


def test_a_training_takes_the_key(run, tmp_path):
    run("MODEL.DN_DETR.RECOMPUTE", "['encoder', 'decoder', 'backbone']", "SOLVER.MAX_ITER", 2)
    assert torch.load(tmp_path / "run" / "model_final.pth")["iteration"] == 1
