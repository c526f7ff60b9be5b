"""Loss terms: term(matched, num_objects) -> losses of the layers [L], in float32.

A term sums the loss over its queries and divides by `matched.positives_per_object * num_objects`,
a mean over the objects of the batch; only `Softmax` has its own normaliser. Queries are selected
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


def _sum_queries(loss: Tensor, is_selected: Tensor) -> Tensor:
    """Sum `loss` [L, B, Q] over the selected queries: [L]."""
    return torch.where(is_selected, loss, 0).sum(dim=(1, 2))


def _is_target_class(matched: Matched) -> Tensor:
    """[L, B, Q, K] bool: the target class of each query, none for unmatched queries."""
    classes = torch.arange(matched.logits.shape[-1], device=matched.logits.device)
    return (matched.labels[..., None] == classes) & matched.is_positive[..., None]


def _query_weight(matched: Matched, unmatched_weight: float) -> Tensor:
    """[L, B, Q]: the score of the target, or `unmatched_weight` without a target."""
    return torch.where(matched.is_positive, matched.target_scores, unmatched_weight)


@dataclass(frozen=True, kw_only=True)
class Focal:
    """Sigmoid focal loss (1708.02002) over all non-empty queries and classes: [L]."""

    alpha: float = 0.25
    gamma: float = 2.0
    unmatched_weight: float = 1.0

    def __call__(self, matched: Matched, num_objects: float | Tensor) -> Tensor:
        is_target = _is_target_class(matched)
        logits = torch.where(is_target, -matched.logits, matched.logits)
        penalty = focal_penalty(logits, self.gamma)
        loss = torch.where(is_target, self.alpha * penalty, (1 - self.alpha) * penalty).sum(-1)
        loss = loss * _query_weight(matched, self.unmatched_weight)
        return _sum_queries(loss, matched.is_real) / (matched.positives_per_object * num_objects)


@dataclass(frozen=True, kw_only=True)
class MatchabilityAware:
    """Matchability-aware loss (DEIM, 2412.04234) over all non-empty queries and classes: [L].

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
        loss = loss * _query_weight(matched, self.unmatched_weight)
        return _sum_queries(loss, matched.is_real) / (matched.positives_per_object * num_objects)


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Cross-entropy with "no object" as the last class (DETR, 2005.12872, appendix A.2): [L].

    A weighted mean over the non-empty queries; ignores `positives_per_object` and `num_objects`.
    """

    unmatched_weight: float = 0.1

    def __call__(self, matched: Matched, num_objects: float | Tensor) -> Tensor:
        label = torch.where(matched.is_positive, matched.labels, matched.logits.shape[-1] - 1)
        loss = -matched.logits.log_softmax(-1).gather(-1, label[..., None]).squeeze(-1)
        weight = _query_weight(matched, self.unmatched_weight)
        total = _sum_queries(weight, matched.is_real)
        loss = _sum_queries(weight * loss, matched.is_real)
        return loss / torch.where(total > 0, total, 1)


@dataclass(frozen=True, kw_only=True)
class L1:
    """L1 distance of boxes in cxcywh, summed over the coordinates: [L]."""

    def __call__(self, matched: Matched, num_objects: float | Tensor) -> Tensor:
        loss = (matched.boxes - matched.target_boxes).abs().sum(-1) * matched.target_scores
        return _sum_queries(loss, matched.is_positive) / (
            matched.positives_per_object * num_objects
        )


@dataclass(frozen=True, kw_only=True)
class GIoU:
    """One minus the generalized IoU (1902.09630) of boxes: [L]."""

    def __call__(self, matched: Matched, num_objects: float | Tensor) -> Tensor:
        overlap = elementwise_generalized_iou(
            cxcywh_to_xyxy(matched.boxes), cxcywh_to_xyxy(matched.target_boxes)
        )
        loss = (1 - overlap) * matched.target_scores
        return _sum_queries(loss, matched.is_positive) / (
            matched.positives_per_object * num_objects
        )
