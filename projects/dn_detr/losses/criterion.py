"""The criterion: every loss term for every layer of every segment.

    loss_ce             classification, last layer of the matched queries (also loss_bbox, ...)
    loss_ce_0           their first layer, and so on up to the last but one
    loss_ce_dn_3        fourth layer of the denoising queries, another segment
    loss_ce_enc         encoder proposals
    loss_ce_teacher     a criterion with a suffix

The keys do not depend on the data: every process has the same ones, even without objects, so that
metrics can be reduced over processes.
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

    Args:
        terms: name (lower-case letters, part of the key) -> (term, weight).
        suffix: appended to all keys, to distinguish criteria over the same predictions.
        segments: names of the segments to train ("encoder/<name>" for proposals), None for all.
        masks: mask terms, or None.
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
                raise ValueError(f"term names must be lower-case letters, got {name!r}")
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
        """Compute all losses in float32 regardless of autocast.

        Args:
            num_objects: objects in the batch, averaged over processes and at least 1.

        Returns:
            Scalars [], weighted by term and segment. Terms without objects are 0 and stay in the
            graph. Layers with non-finite predictions or costs (`Assignment.is_bad`) are NaN, which
            reports them without another device synchronisation.
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
    """Key part of a segment: "" for "match", "enc" for "encoder/match", otherwise the name."""
    place, _, name = segment.rpartition("/")
    return _joined("enc" if place else "", "" if name == "match" else name)


def _joined(*words: str) -> str:
    """Join the non-empty words; Dynamo in torch 2.8 cannot trace `filter`."""
    return "_".join([word for word in words if word])


def gather_targets(part: Predictions, targets: Targets, assignment: Assignment) -> Matched:
    """Pair the predictions of one segment with their assigned ground truth, see `Matched`.

    Empty queries get logits 0 and boxes 0.5 without gradient. Tensors are [L, B, Q, ...].
    """
    object_of = assignment.object_of
    layers = object_of.shape[0]
    is_real = assignment.is_real.expand(layers, -1, -1)
    index = object_of.clamp(min=0)
    logits = torch.where(is_real[..., None], at_least_float32(part.logits), 0)
    boxes = part.boxes
    if boxes is not None:
        boxes = torch.where(is_real[..., None], at_least_float32(boxes), 0.5)

    def pick(values: Tensor) -> Tensor:  # [B, M] -> [L, B, Q]
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
"""Loss term in a key; the first two are those of Faster R-CNN in Detectron2."""


def summarize(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum the losses of each segment over terms and layers: loss_match, loss_dn, ...

    Args:
        losses: scalars [] under the keys of one or more criteria, or of Faster R-CNN in Detectron2
            (whose first stage becomes loss_rpn).

    Returns:
        Scalars [] under "loss_<segment>".

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
