"""Our side of a comparison: weights by the converter, predictions, losses."""

from __future__ import annotations

import torch
import torchvision
from peers import difference, layers_of, loss_differences

from dn_detr.build import LossConfig
from dn_detr.conversion.convert_weights import convert
from dn_detr.conversion.name_table import Table, resnet
from dn_detr.losses.matcher import Costs, assign

LARGEST = 1e-4
"""Largest relative difference of predictions and losses."""


def load(method, ours, theirs, backbone="backbone.0.body"):
    """Carry the weights of `theirs` to `ours` by the converter; all of them, and nothing more.

    backbone: the name of theirs, which the compared model lacks and the converter expects; None: it
    is Detectron2's.
    """
    with torch.device("meta"):
        parameters = torchvision.models.resnet50(weights=None).state_dict()
    names = {f"{backbone}.{n}": t for n, t in parameters.items() if not n.startswith("fc.")}
    if backbone is None:
        names, *_ = Table("torchvision", resnet("None")).apply(names)
    state, _ = convert({**theirs.state_dict(), **names}, method)
    core = {
        name.removeprefix("core."): tensor
        for name, tensor in state.items()
        if name.startswith("core.")
    }
    ours.load_state_dict(core)
    return ours


def compare(method, ours, theirs, output, features, padding, targets=None, **names):
    """Predictions of ours, after comparing those of all layers with `output` of theirs."""
    load(method, ours, theirs, **names)
    predictions = ours.train(targets is not None)(features, padding, targets)
    matched = predictions.of("match")
    found = {
        "logits": difference(matched.logits, layers_of(output, "pred_logits")),
        "boxes": difference(matched.boxes, layers_of(output, "pred_boxes")),
    }
    print(f"largest relative difference: {found}")
    assert max(found.values()) < LARGEST, found
    return predictions


def compare_losses(predictions, targets, theirs, prefix="", *, costs=None, **criterion):
    """Compare the unweighted losses of all layers and segments with `theirs`.

    prefix: of the denoising losses of theirs; criterion: keyword arguments of ours.
    """
    assignments = assign(predictions, targets, costs or Costs())
    terms = LossConfig(l1_weight=1.0, giou_weight=1.0, **criterion).criterion()
    ours = terms(predictions, targets, assignments, max(1, sum(targets.counts)))
    found = loss_differences(ours, theirs, prefix)
    assert len(found) == 3 * predictions.logits.shape[0] * len(predictions.segments)
    print(f"largest relative difference of {len(found)} losses: {max(found.values()):.1e}")
    assert max(found.values()) < LARGEST, found
