"""DEIM's matchability-aware loss and matching against ShihuaHuang95/DEIM.

Its detectors (D-FINE, RT-DETRv2) are none of ours: predictions are given. As in its RT-DETRv2,
boxes are trained with the matches of their own layer (`use_uni_set: False`).
"""

from __future__ import annotations

import torch
from compare import check, losses_of, under_their_names
from peers import difference, objects
from torch import nn

from dn_detr.build import LossConfig
from dn_detr.structures import Predictions, Segment

LAYERS, QUERIES, CLASSES = 3, 11, 7


class Given(nn.Module):
    """Predictions that are parameters themselves."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.logits = nn.Parameter(torch.randn(LAYERS, 2, QUERIES, CLASSES, generator=generator))
        self.boxes = nn.Parameter(torch.randn(LAYERS, 2, QUERIES, 4, generator=generator))


def test_matchability_aware_training_equals_the_authors(authors, float64):  # noqa: ARG001
    load = authors("DEIM")
    weights = {"cost_class": 2, "cost_bbox": 5, "cost_giou": 2}
    matcher = load("engine.deim.matcher").HungarianMatcher(weights, use_focal_loss=True)
    criterion = load("engine.deim.deim_criterion").DEIMCriterion(
        matcher,
        {"loss_mal": 1, "loss_bbox": 5, "loss_giou": 2},
        ["mal", "boxes"],
        gamma=1.5,
        num_classes=CLASSES,
        use_uni_set=False,
    )
    their_targets, targets = objects(3, 5, num_classes=CLASSES)
    ours, theirs = Given(), Given()
    layers = [
        {"pred_logits": logits, "pred_boxes": boxes.sigmoid()}
        for logits, boxes in zip(theirs.logits, theirs.boxes, strict=True)
    ]
    output = {**layers[-1], "aux_outputs": layers[:-1], "enc_aux_outputs": []}
    their_losses = criterion({**output, "enc_meta": {"class_agnostic": False}}, their_targets)
    predictions = Predictions(
        logits=ours.logits,
        boxes=ours.boxes.sigmoid(),
        references=(None,) * LAYERS,
        segments=(Segment("match", QUERIES),),
    )
    config = LossConfig(kind="mal")
    found = losses_of(
        predictions, targets, costs=config.costs(), kind="mal", l1_weight=5.0, giou_weight=2.0
    )
    named = {
        name.replace("loss_mal", "loss_ce").replace("_aux", ""): value
        for name, value in their_losses.items()
    }
    found = under_their_names(found, named, {"match": "{}"})
    assert set(found) == set(named)
    check("deim", "losses", {
        name: float((value - named[name]).abs() / named[name].abs())
        for name, value in found.items()
    })  # fmt: skip
    sum(found.values()).backward()
    sum(their_losses.values()).backward()
    check("deim", "gradients", {
        name: difference(parameter.grad, theirs.get_parameter(name).grad)
        for name, parameter in ours.named_parameters()
    })  # fmt: skip
