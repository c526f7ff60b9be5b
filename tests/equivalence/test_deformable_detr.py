"""The variants of Deformable DETR against fundamentalvision/Deformable-DETR."""

from __future__ import annotations

from argparse import Namespace

import pytest
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
    features, padding = inputs
    theirs, criterion, samples = their_model(
        authors("Deformable-DETR"), features, padding, monkeypatch, **variant
    )
    output = theirs(samples)
    ours = our_model(method, {"epsilon": 1e-5, "as_published": True})
    pair = Pair(method, method, ours, theirs)
    predictions = compare(pair, output, features, padding)
    if variant["two_stage"]:
        proposals, encoder = predictions.proposals, output["enc_outputs"]
        assert difference(proposals.logits[0], encoder["pred_logits"]) < 1e-4
        assert difference(proposals.boxes[0], encoder["pred_boxes"]) < 1e-4
    their_targets, targets = objects(*counts)
    losses = criterion(output, their_targets)
    compare_losses(
        pair,
        losses_of(predictions, targets),
        losses,
        {"match": "{}", "enc": "{}_enc"},
    )
