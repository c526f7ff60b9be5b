"""H-Deformable-DETR against HDETR/H-Deformable-DETR."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from compare import LARGEST, Pair, compare, compare_losses, losses_of
from multiscale import ARGS, GivenPyramid, our_model, use_fallback
from peers import difference, layers_of, objects, randomize

from dn_detr.build import HybridMatching


def their_model(load, features, padding, monkeypatch):
    use_fallback(load, "models.ops", monkeypatch)
    nested = load("util.misc").NestedTensor
    args = Namespace(
        **{**vars(ARGS), "two_stage": True},
        num_queries_one2one=300,
        num_queries_one2many=40,
        mixed_selection=True,
        look_forward_twice=True,
        use_checkpoint=False,
    )
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
        num_feature_levels=4,
        with_box_refine=True,
        two_stage=True,
        num_queries_one2one=300,
        num_queries_one2many=40,
        mixed_selection=True,
    )
    randomize(model)
    matcher = load("models.matcher").HungarianMatcher(2, 5, 2)
    criterion = detr.SetCriterion(91, matcher, {}, ["labels", "boxes", "cardinality"])
    return model, criterion, nested(padding[:, None].float(), padding)


@pytest.mark.parametrize("counts", [(3, 5), (0, 2)])
def test_h_deformable_equals_the_authors(authors, inputs, monkeypatch, counts):
    features, padding = inputs
    theirs, criterion, samples = their_model(
        authors("H-Deformable-DETR"), features, padding, monkeypatch
    )
    output = theirs(samples)
    ours = our_model(
        "h_deformable",
        {"epsilon": 1e-5, "num_queries": 300, "as_published": True},
        hybrid=HybridMatching(num_queries=40, matches_per_object=6),
    )
    their_targets, targets = objects(*counts)
    pair = Pair("h_deformable", "h_deformable", ours, theirs)
    predictions = compare(pair, output, features, padding, targets)
    many = {
        "pred_logits": output["pred_logits_one2many"],
        "pred_boxes": output["pred_boxes_one2many"],
        "aux_outputs": output["aux_outputs_one2many"],
    }
    hybrid = predictions.of("hybrid")
    assert difference(hybrid.logits, layers_of(many, "pred_logits")) < LARGEST
    assert difference(hybrid.boxes, layers_of(many, "pred_boxes")) < LARGEST
    losses = criterion(output, their_targets)
    repeated = [{key: torch.cat([value] * 6) for key, value in t.items()} for t in their_targets]
    losses |= {f"{key}_many": value for key, value in criterion(many, repeated).items()}
    patterns = {"match": "{}", "hybrid": "{}_many", "enc": "{}_enc"}
    compare_losses(pair, losses_of(predictions, targets), losses, patterns)
