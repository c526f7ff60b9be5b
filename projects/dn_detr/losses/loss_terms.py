"""Loss terms: term(matched, num_objects) -> losses of layers and segments [L, n], in float32.

A term sums the loss over its queries and divides by `matched.positives_per_object * num_objects`,
a mean over the objects of the batch; only `Softmax` has its own normalizer. Queries are selected
with `where`, not by multiplication with a mask, because 0 x NaN is NaN.

Targets of a teacher are weighted by their score (1 for ground truth), and class terms weight
unmatched queries by `unmatched_weight` (Teach-DETR, 2211.11953: 0.5; 1 for ground truth).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_detr.layers.box_ops import cxcywh_to_xyxy, elementwise_generalized_iou, elementwise_iou
from dn_detr.losses.matching_costs import focal_penalty
from dn_detr.structures import Matched


def _sum_queries(loss: Tensor, is_selected: Tensor, matched: Matched) -> Tensor:
    """Sum `loss` [L, B, Q] over the selected queries of each segment: [L, n]."""
    parts = torch.where(is_selected, loss, 0).split(matched.sizes, dim=2)
    return torch.stack([part.sum(dim=(1, 2)) for part in parts], dim=1)


def _mean_over_objects(
    loss: Tensor, is_selected: Tensor, matched: Matched, num_objects: float | Tensor
) -> Tensor:
    """Sum `loss` [L, B, Q] over the selected queries, per object: [L, n]."""
    return _sum_queries(loss, is_selected, matched) / (matched.positives_per_object * num_objects)


def _is_target_class(matched: Matched) -> Tensor:
    """[L, B, Q, K] bool: the target class of each query, none for unmatched queries."""
    classes = torch.arange(matched.logits.shape[-1], device=matched.logits.device)
    return torch.where(matched.is_positive, matched.labels, -1)[..., None] == classes


def _weighted(loss: Tensor, matched: Matched, unmatched_weight: float = 1.0) -> Tensor:
    """Multiply `loss` [L, B, Q] by the score of the target, or by `unmatched_weight`."""
    if matched.target_scores is None and unmatched_weight == 1:
        return loss
    scores = 1.0 if matched.target_scores is None else matched.target_scores
    return loss * torch.where(matched.is_positive, scores, unmatched_weight).to(loss.dtype)


@dataclass(frozen=True, kw_only=True)
class Focal:
    """Sigmoid focal loss (1708.02002) over all non-empty queries and classes: [L, n]."""

    alpha: float = 0.25
    gamma: float = 2.0
    unmatched_weight: float = 1.0

    def __call__(self, matched: Matched, num_objects: float | Tensor) -> Tensor:
        is_target = _is_target_class(matched)
        logits = torch.where(is_target, -matched.logits, matched.logits)
        weight = torch.where(is_target, self.alpha, 1 - self.alpha).to(logits.dtype)
        loss = (weight * focal_penalty(logits, self.gamma)).sum(-1)
        loss = _weighted(loss, matched, self.unmatched_weight)
        return _mean_over_objects(loss, matched.is_real, matched, num_objects)


@dataclass(frozen=True, kw_only=True)
class MatchabilityAware:
    """Matchability-aware loss (DEIM, 2412.04234) over all non-empty queries and classes: [L, n].

    The target of a matched query is its IoU with the object to the power of gamma; negatives are
    weighted by their probability to the power of gamma. Neither factor has a gradient.
    """

    gamma: float = 1.5
    unmatched_weight: float = 1.0

    def __call__(self, matched: Matched, num_objects: float | Tensor) -> Tensor:
        is_target = _is_target_class(matched)
        overlap = elementwise_iou(
            cxcywh_to_xyxy(matched.boxes.detach()), cxcywh_to_xyxy(matched.target_boxes)
        )
        quality = torch.where(is_target, (overlap**self.gamma)[..., None], 0)
        weight = torch.where(is_target, 1, matched.logits.detach().sigmoid() ** self.gamma)
        # Cross-entropy is softplus(x) - quality x; the weight is 1 wherever quality is not 0.
        loss = (weight * F.softplus(matched.logits) - quality * matched.logits).sum(-1)
        loss = _weighted(loss, matched, self.unmatched_weight)
        return _mean_over_objects(loss, matched.is_real, matched, num_objects)


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Cross-entropy with "no object" as the last class (DETR, 2005.12872, appendix A.2): [L, n].

    A weighted mean over the non-empty queries; ignores `positives_per_object` and `num_objects`.
    """

    unmatched_weight: float = 0.1

    def __call__(self, matched: Matched, num_objects: float | Tensor) -> Tensor:
        label = torch.where(matched.is_positive, matched.labels, matched.logits.shape[-1] - 1)
        loss = -matched.logits.log_softmax(-1).gather(-1, label[..., None]).squeeze(-1)
        weight = _weighted(torch.ones_like(loss), matched, self.unmatched_weight)
        total = _sum_queries(weight, matched.is_real, matched)
        loss = _sum_queries(weight * loss, matched.is_real, matched)
        return loss / torch.where(total > 0, total, 1)


@dataclass(frozen=True, kw_only=True)
class L1:
    """L1 distance of boxes in cxcywh, summed over the coordinates: [L, n]."""

    def __call__(self, matched: Matched, num_objects: float | Tensor) -> Tensor:
        loss = _weighted((matched.boxes - matched.target_boxes).abs().sum(-1), matched)
        return _mean_over_objects(loss, matched.is_positive, matched, num_objects)


@dataclass(frozen=True, kw_only=True)
class GIoU:
    """One minus the generalized IoU (1902.09630) of boxes: [L, n]."""

    def __call__(self, matched: Matched, num_objects: float | Tensor) -> Tensor:
        overlap = elementwise_generalized_iou(
            cxcywh_to_xyxy(matched.boxes), cxcywh_to_xyxy(matched.target_boxes)
        )
        loss = _weighted(1 - overlap, matched)
        return _mean_over_objects(loss, matched.is_positive, matched, num_objects)
