"""Starting values that training depends on, as in the authors' code.

`tests/equivalence/test_starting_values.py` compares all of them with their models.
"""

from __future__ import annotations

import math

import pytest
import torch
from tiny import config_of
from torch import nn

from dn_detr.build import build_model
from dn_detr.layers.deformable_module import DeformableAttention
from dn_detr.methods import METHODS
from dn_detr.models.prediction_heads import Heads
from dn_detr.models.proposals import ProposalHead

CHANNELS, HIDDEN, CLASSES, POINTS = 64, 96, 11, 3
ENCODER_ONLY = "dab_deformable_encoder_only"
WITHOUT_BOX_HEADS = ("mask2former", "mask_dino")
TWO_STAGE = ("deformable_detr_two_stage", "dino", "h_deformable")
RING = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
"""Where the eight heads look: to the neighbours of a cell, point p at p times the distance."""


def model_of(method: str, **numbers):
    torch.manual_seed(5)
    sizes = {
        "num_classes": CLASSES,
        "num_queries": 20,
        "channels": CHANNELS,
        "feed_forward_dim": HIDDEN,
        "num_points": POINTS,
        "encoder_layers": 2,
        "decoder_layers": 3,
    }
    config = config_of(method, **{**sizes, **numbers})
    return build_model(method, config, in_channels=[16, 24, 32], strides=[8, 16, 32])


def parts(model, kind) -> list:
    return [module for module in model.modules() if isinstance(module, kind)]


def is_uniform(tensor: torch.Tensor, bound: float) -> bool:
    """Whether all values are within the bound and, as far as so many can tell, up to it."""
    least = (1e-9) ** (1 / tensor.numel())  # all are below with probability 1e-9
    return least * bound < tensor.abs().max() <= bound


def xavier(*sizes: int) -> float:
    return math.sqrt(6 / sum(sizes))


@pytest.mark.parametrize("method", METHODS)
def test_heads_sample_in_a_ring_around_the_reference_whatever_the_query(method):
    modules = parts(model_of(method), DeformableAttention)
    is_dense = method.startswith(("detr", "conditional", "anchor", "smca", "dab_detr"))
    assert bool(modules) != is_dense
    ring = torch.tensor(RING, dtype=torch.float32)[:, None, None]
    ring = ring * torch.arange(1, POINTS + 1)[:, None]
    for module in modules:
        offsets = module.sampling_offsets.bias.reshape(8, -1, POINTS, 2)
        torch.testing.assert_close(offsets, ring.expand_as(offsets), rtol=0, atol=1e-5)
        assert not module.attention_weights.bias.any()
        for linear in (module.sampling_offsets, module.attention_weights):
            if method == ENCODER_ONLY:
                assert is_uniform(linear.weight, xavier(*linear.weight.shape))
            else:
                assert not linear.weight.any()


@pytest.mark.parametrize("method", [m for m in METHODS if m not in WITHOUT_BOX_HEADS])
def test_classes_start_with_probability_one_percent_and_boxes_at_their_reference(method):
    (heads,) = parts(model_of(method), Heads)
    heads_of_classes = [*heads.class_heads]
    for head in parts(model_of(method), ProposalHead):
        heads_of_classes.append(head.class_head)
        assert not head.box_head.layers[-1].weight.any() and not head.box_head.layers[-1].bias.any()
    for head in heads_of_classes:
        assert torch.allclose(head.bias.sigmoid(), torch.tensor(0.01))
    small = ("deformable_detr", "deformable_detr_refine", "dab_deformable", "anchor_detr")
    for layer, head in enumerate(heads.box_heads):
        last = head.layers[-1]
        if method in ("detr", "smca", "smca_multiscale", ENCODER_ONLY):
            assert is_uniform(last.weight, CHANNELS**-0.5) and last.bias.all()
            continue
        # A width and height of sigmoid(-2) = 0.12 where they are no refinement of others.
        size = -2.0 if method in small and layer == 0 else 0.0
        assert not last.weight.any() and last.bias.tolist() == [0.0, 0.0, size, size]


@pytest.mark.parametrize("method", ["detr", "mask2former"])
def test_a_softmax_over_classes_starts_without_preference_of_no_object(method):
    model = model_of(method, has_no_object=True)
    heads = model.decoder.predictor.heads if method == "detr" else model.decoder.heads
    head = heads.class_heads[0] if method == "detr" else heads.class_head
    assert is_uniform(head.bias, CHANNELS**-0.5)


def test_mask_dino_starts_without_a_class_prior():
    head = model_of("mask_dino").query_design.heads.class_head
    assert is_uniform(head.bias, CHANNELS**-0.5)


@pytest.mark.parametrize("method", ["dab_deformable", "deformable_detr_refine", *TWO_STAGE])
def test_heads_of_all_layers_start_equal(method):
    (heads,) = parts(model_of(method), Heads)
    for group in (heads.class_heads, heads.box_heads):
        assert len(group) == (1 if method == "dino" else 3)
        for head in group:
            for one, first in zip(head.parameters(), group[0].parameters(), strict=True):
                assert torch.equal(one[..., :2], first[..., :2])  # all but the size


@pytest.mark.parametrize("method", TWO_STAGE)
def test_projections_of_proposals_start_with_a_bias(method):
    design = model_of(method).query_design
    assert is_uniform(design.learned.head.project.bias, CHANNELS**-0.5)
    if method != "dino":
        assert is_uniform(design.transform.project.bias, (2 * CHANNELS) ** -0.5)


def test_content_and_patterns_start_from_the_distribution_of_their_code():
    """Standard normal, but Xavier-uniform in DINO and in the encoder-only model."""
    content = model_of("dino").query_design.learned.content
    assert is_uniform(content, xavier(20, CHANNELS))
    patterns = model_of(ENCODER_ONLY, num_patterns=3).query_design.shared.patterns
    assert is_uniform(patterns, xavier(3, CHANNELS))
    for method, name in (
        ("dab_deformable", "learned.content"),
        ("h_deformable", "learned.content"),
        ("anchor_detr", "shared.patterns"),
        ("dab_detr", "shared.patterns"),
    ):
        rows = model_of(method, num_patterns=3).query_design.get_parameter(name)
        assert 0.7 < rows.std() < 1.3 and rows.abs().max() > 2, method


def test_layers_of_anchor_detr_are_equal_and_without_xavier():
    model = model_of("anchor_detr")
    for layers in (model.encoder.layers, model.decoder.layers):
        for layer in layers:
            for one, first in zip(layer.parameters(), layers[0].parameters(), strict=True):
                assert torch.equal(one, first)
            assert is_uniform(layer.feed_forward.expand.weight, CHANNELS**-0.5)
            assert is_uniform(layer.feed_forward.contract.weight, HIDDEN**-0.5)
    out = model.decoder.layers[0].self_attention.out
    assert is_uniform(out.weight, CHANNELS**-0.5) and not out.bias.any()


def test_the_neck_of_the_encoder_only_model_starts_by_default():
    for level in model_of(ENCODER_ONLY).neck.levels:
        assert isinstance(level[0], nn.Conv2d)
        bound = level[0].weight[0].numel() ** -0.5
        assert is_uniform(level[0].weight, bound) and is_uniform(level[0].bias, bound)
