"""The loss: every term on every layer of every segment, under keys that never depend on the data.

    loss_ce             classes, last layer of the matched queries (also loss_bbox, loss_giou, ...)
    loss_ce_0           their first layer, and so on up to the last but one
    loss_ce_dn_3        another segment: denoising queries
    loss_ce_enc         the proposals of the encoder
    loss_ce_teacher     of a criterion with a suffix

The same keys come from every process, also where no image has an object, as gathering metrics over
processes demands.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dn_detr.layers.box_ops import at_least_float32
from dn_detr.losses.mask_terms import MaskTerms
from dn_detr.losses.segments import split_segments
from dn_detr.protocols import LossTerm
from dn_detr.structures import Assignment, Assignments, Matched, Predictions, Targets


class Criterion:
    """Weighted losses of the assigned predictions.

    terms: name (lower-case letters, part of the key) -> (term, weight); suffix: of all keys, tells
    apart several criteria over the same predictions; segments: names of the segments served
    ("encoder/<name>" for proposals), None = all. masks: further terms, of masks; None = no masks.
    """

    def __init__(
        self,
        terms: Mapping[str, tuple[LossTerm, float]],
        *,
        suffix: str = "",
        segments: Collection[str] | None = None,
        masks: MaskTerms | None = None,
    ):
        for name in terms:
            if not re.fullmatch("[a-z]+", name):
                raise ValueError(f"names of terms must be lower-case letters, got {name!r}")
        self.terms = dict(terms)
        self.suffix = suffix
        self.segments = segments
        self.masks = masks

    def __call__(
        self,
        predictions: Predictions,
        targets: Targets,
        assignments: Assignments,
        num_objects: float | Tensor,
    ) -> dict[str, Tensor]:
        """Scalar losses, times the weights of term and segment, in float32 whatever autocast says.

        num_objects: of the batch, averaged over the processes and at least 1. Terms without any
        object are 0 and still part of the graph. Layers whose matching is bad have the loss NaN:
        so whoever reads the losses learns of it without another wait for the device.
        """
        losses = {}
        with torch.autocast(predictions.logits.device.type, enabled=False):
            sampled = None if self.masks is None else self.masks.points.sample(predictions, targets)
            for name, part in split_segments(predictions, self.segments).items():
                if name not in assignments:
                    raise ValueError(
                        f"segment {name!r} has no assignment, only {sorted(assignments)} have"
                    )
                matched = gather_targets(part, targets, assignments[name])
                is_bad = assignments[name].is_bad
                terms = self.terms
                if sampled is not None and name not in self.masks.without:
                    points = sampled.of(part, assignments[name], matched.target_scores)
                    matched = replace(matched, mask_points=points)
                    terms = {**terms, **self.masks.terms}
                for term_name, (term, weight) in terms.items():
                    values = term(matched, num_objects) * (weight * part.segments[0].weight)
                    if is_bad is not None:
                        values = torch.where(is_bad.any(1), torch.nan, values)
                    key = _joined("loss", term_name, _label(name), self.suffix)
                    last = values.shape[0] - 1
                    for layer, value in enumerate(values.unbind()):
                        losses[key if layer == last else f"{key}_{layer}"] = value
        return losses


def _label(segment: str) -> str:
    """Part of the keys: none for "match", "enc" for "encoder/match", else the name."""
    place, _, name = segment.rpartition("/")
    return _joined("enc" if place else "", "" if name == "match" else name)


def _joined(*words: str) -> str:
    """The words that are not empty; without `filter`, which Dynamo of torch 2.8 cannot trace."""
    return "_".join([word for word in words if word])


def gather_targets(part: Predictions, targets: Targets, assignment: Assignment) -> Matched:
    """The predictions of one segment beside the ground truth that its slots are assigned.

    Slots that do not exist get logits 0 and boxes .5 without gradient, whatever stood there.
    """
    object_of = assignment.object_of
    layers = object_of.shape[0]
    is_real = assignment.is_real.expand(layers, -1, -1)
    index = object_of.clamp(min=0)
    logits = torch.where(is_real[..., None], at_least_float32(part.logits), 0)
    boxes = part.boxes
    if boxes is not None:
        boxes = torch.where(is_real[..., None], at_least_float32(boxes), 0.5)

    def pick(values: Tensor) -> Tensor:  # [B, M] -> [L, B, q]
        return values.expand(layers, -1, -1).gather(2, index)

    target_boxes = torch.stack([pick(side) for side in targets.boxes.unbind(-1)], dim=-1)
    scores = torch.ones_like(targets.boxes[..., 0]) if targets.scores is None else targets.scores
    return Matched(
        logits=logits,
        boxes=boxes,
        labels=torch.zeros_like(index) if part.is_class_agnostic else pick(targets.labels),
        target_boxes=target_boxes.to(logits.dtype),
        target_scores=pick(scores).to(logits.dtype),
        is_positive=(object_of >= 0) & is_real,
        is_real=is_real,
        assignment=assignment,
        positives_per_object=part.segments[0].positives_per_object,
    )


TERM = r"rpn(?=_cls|_loc)|box_reg|[a-z]+"
"""A loss term in a key; the first two are Detectron2's, of Faster R-CNN."""


def summarize(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add up the losses of each segment over terms and layers: loss_match, loss_dn, ...

    Args:
        losses: scalars under the keys of one or more criteria, or of Detectron2's Faster R-CNN
            (whose first stage becomes loss_rpn).

    Returns:
        Scalars under "loss_<segment>".

    Raises:
        ValueError: for any other key.
    """
    totals: dict[str, Tensor] = {}
    for key, value in losses.items():
        parsed = re.fullmatch(rf"loss_({TERM})(?:_(.+?))??(?:_\d+)?", key)
        if parsed is None:
            raise ValueError(f"keys must be those of a Criterion, got {key!r}")
        name = "loss_rpn" if parsed[1] == "rpn" else f"loss_{parsed[2] or 'match'}"
        totals[name] = totals[name] + value if name in totals else value
    return totals
