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

import torch
from torch import Tensor

from dn_detr.layers.box_ops import at_least_float32
from dn_detr.layers.constants import constant
from dn_detr.losses.mask_terms import MaskTerms
from dn_detr.losses.segments import ENCODER, split_segments
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
        names = list(split_segments(predictions, self.segments))
        for name in names:
            if name not in assignments:
                raise ValueError(
                    f"segment {name!r} has no assignment, only {sorted(assignments)} have"
                )
        losses: dict[str, Tensor] = {}
        with torch.autocast(predictions.logits.device.type, enabled=False):
            sampled = None if self.masks is None else self.masks.points.sample(predictions, targets)
            for place, source in (("", predictions), (ENCODER, predictions.proposals)):
                chosen = [name for name in names if name.startswith(ENCODER) == bool(place)]
                if not chosen:
                    continue
                part = source.of(*(name.removeprefix(place) for name in chosen))
                matched = gather_targets(part, targets, [assignments[name] for name in chosen])
                values = self._weighted_terms(part, matched, num_objects)
                for i, (name, segment) in enumerate(zip(chosen, part.segments, strict=True)):
                    assignment, of_terms, term_names = assignments[name], values[i], [*self.terms]
                    if sampled is not None and name not in self.masks.without:
                        scores = matched.target_scores
                        scores = None if scores is None else scores.split(matched.sizes, 2)[i]
                        points = sampled.of(source.of(segment.name), assignment, scores)
                        normalizer = segment.positives_per_object * num_objects
                        for term_name, (term, weight) in self.masks.terms.items():
                            value = term(points, normalizer) * (weight * segment.weight)
                            of_terms = torch.cat((of_terms, value[None]))
                            term_names.append(term_name)
                    if assignment.is_bad is not None:
                        of_terms = torch.where(assignment.is_bad.any(1), torch.nan, of_terms)
                    keys = self._keys(term_names, name, layers=of_terms.shape[1])
                    losses.update(zip(keys, of_terms.flatten().unbind(), strict=True))
        return losses

    def _weighted_terms(
        self, part: Predictions, matched: Matched, num_objects: float | Tensor
    ) -> tuple[Tensor, ...]:
        """Of each segment of `part`, the terms without masks [terms, L]."""
        values = torch.stack([term(matched, num_objects) for term, _ in self.terms.values()])
        weights = tuple(
            (tuple(weight * segment.weight for segment in part.segments),)
            for _, weight in self.terms.values()
        )
        return (values * constant(weights, values.dtype, values.device)).unbind(2)

    def _keys(self, term_names: list[str], segment: str, layers: int) -> list[str]:
        keys = [_joined("loss", name, _label(segment), self.suffix) for name in term_names]
        names = [[*(f"{key}_{layer}" for layer in range(layers - 1)), key] for key in keys]
        return [name for layer_names in names for name in layer_names]


def _label(segment: str) -> str:
    """Key part of a segment: "" for "match", "enc" for "encoder/match", otherwise the name."""
    place, _, name = segment.rpartition("/")
    return _joined("enc" if place else "", "" if name == "match" else name)


def _joined(*words: str) -> str:
    """Join the non-empty words; Dynamo in torch 2.8 cannot trace `filter`."""
    return "_".join([word for word in words if word])


def gather_targets(part: Predictions, targets: Targets, assignments: list[Assignment]) -> Matched:
    """Pair the predictions of some segments with their assigned ground truth, see `Matched`.

    Empty queries get logits 0 and boxes 0.5 without gradient. Tensors are [L, B, Q, ...].
    """
    object_of = torch.cat([assignment.object_of for assignment in assignments], dim=2)
    layers = object_of.shape[0]
    is_real = torch.cat([assignment.is_real for assignment in assignments], dim=1)
    is_real = is_real.expand(layers, -1, -1)
    index = object_of.clamp(min=0)
    logits = torch.where(is_real[..., None], at_least_float32(part.logits), 0)
    boxes = part.boxes
    if boxes is not None:
        boxes = torch.where(is_real[..., None], at_least_float32(boxes), 0.5)

    def pick(values: Tensor) -> Tensor:  # [B, M] -> [L, B, Q]
        return values.expand(layers, -1, -1).gather(2, index)

    target_boxes = targets.boxes.expand(layers, -1, -1, -1)
    target_boxes = target_boxes.gather(2, index[..., None].expand(-1, -1, -1, 4))
    positives = tuple(segment.positives_per_object for segment in part.segments)
    return Matched(
        logits=logits,
        boxes=boxes,
        labels=torch.zeros_like(index) if part.is_class_agnostic else pick(targets.labels),
        target_boxes=target_boxes.to(logits.dtype),
        target_scores=None if targets.scores is None else pick(targets.scores).to(logits.dtype),
        is_positive=(object_of >= 0) & is_real,
        is_real=is_real,
        sizes=tuple(segment.size for segment in part.segments),
        positives_per_object=constant(positives, logits.dtype, logits.device),
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
