"""The variants of Deformable DETR against fundamentalvision/Deformable-DETR."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from compare import Pair, compare, compare_losses, losses_of
from multiscale import ARGS, GivenPyramid, our_model, use_fallback
from peers import difference, objects, randomize


def their_model(load, features, padding, monkeypatch, *, refine, two_stage):
    use_fallback(load, "models.ops", monkeypatch)
    nested = load("util.misc").NestedTensor
    args = Namespace(**{**vars(ARGS), "two_stage": two_stage})
    detr = load("models.deformable_detr")
    model = detr.DeformableDETR(
        GivenPyramid(
            nested,
            features,
            padding,
            load("models.position_encoding").build_position_encoding(args),
        ),
        load("models.deformable_transformer").build_deforamble_transformer(args),
        num_classes=91,
        num_queries=11,
        num_feature_levels=4,
        with_box_refine=refine,
        two_stage=two_stage,
    )
    randomize(model)
    if two_stage:  # padding, whose tokens theirs sets to 0, then scores less than the best tokens
        model.transformer.enc_output.bias.data.zero_()
        model.transformer.enc_output_norm.bias.data.zero_()
    matcher = load("models.matcher").HungarianMatcher(2, 5, 2)
    criterion = detr.SetCriterion(91, matcher, {}, ["labels", "boxes", "cardinality"])
    return model, criterion, nested(padding[:, None].float(), padding)


@pytest.mark.parametrize(
    "method, variant",
    [
        ("deformable_detr", {"refine": False, "two_stage": False}),
        ("deformable_detr_refine", {"refine": True, "two_stage": False}),
        ("deformable_detr_two_stage", {"refine": True, "two_stage": True}),
    ],
)
@pytest.mark.parametrize("counts", [(3, 5), (0, 2)])
def test_deformable_detr_equals_the_authors(authors, inputs, monkeypatch, method, variant, counts):
    """Padding tokens of their two-stage model are negatives of the proposals' loss."""
    features, padding = inputs
    theirs, criterion, samples = their_model(
        authors("Deformable-DETR"), features, padding, monkeypatch, **variant
    )
    output = theirs(samples)
    ours = our_model(method, {"epsilon": 1e-5})
    pair = Pair(method, method, ours, theirs)
    predictions = compare(pair, output, features, padding)
    empty = []
    if variant["two_stage"]:
        proposals = predictions.proposals
        exist = ~proposals.segments[0].is_empty
        their_boxes = output["enc_outputs"]["pred_boxes"]
        assert difference(proposals.logits[0], output["enc_outputs"]["pred_logits"]) < 1e-4
        torch.testing.assert_close(proposals.boxes[0][exist], their_boxes[exist], rtol=0, atol=1e-5)
        empty = ["encoder/match"]
    their_targets, targets = objects(*counts)
    losses = criterion(output, their_targets)
    compare_losses(
        pair,
        losses_of(predictions, targets, counts_empty=empty),
        losses,
        {"match": "{}", "enc": "{}_enc"},
    )
