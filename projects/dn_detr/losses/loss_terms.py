"""Loss terms: term(matched, num_objects) -> one loss for each layer, [L].

A term adds up what its slots owe and divides by `matched.positives_per_object * num_objects`, a mean over the
objects of the batch; only softmax has a normaliser of its own. Slots are chosen with `where`, never
by multiplying with a mask, because 0 x NaN is NaN. `matched` holds float32 (see `criterion`).

A teacher's target weighs as much as its score (1 for ground truth), and class terms weigh slots
without object by `unmatched_weight` (Teach-DETR, 2211.11953: 0.5; 1 for ground truth).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_detr.layers.box_ops import cxcywh_to_xyxy, elementwise_generalized_iou, elementwise_iou
from dn_detr.losses.matching_costs import focal_penalty
from dn_detr.structures import Matched


def _sum_slots(loss: Tensor, is_chosen: Tensor) -> Tensor:
    """Sum of `loss` [L, B, q] over the chosen slots: [L]."""
    return torch.where(is_chosen, loss, 0).sum(dim=(1, 2))


def _is_target_class(matched: Matched) -> Tensor:
    """[L, B, q, K] bool: the class that a slot must say; none in slots without object."""
    classes = torch.arange(matched.logits.shape[-1], device=matched.logits.device)
    return (matched.labels[..., None] == classes) & matched.is_positive[..., None]


def _slot_weight(matched: Matched, unmatched_weight: float) -> Tensor:
    """[L, B, q]: the target's score, or `unmatched_weight` where there is no target."""
    return torch.where(matched.is_positive, matched.target_scores, unmatched_weight)


@dataclass(frozen=True, kw_only=True)
class Focal:
    """Sigmoid focal loss (1708.02002) of every real slot and class."""

    alpha: float = 0.25
    gamma: float = 2.0
    unmatched_weight: float = 1.0

    def __call__(self, matched: Matched, num_objects: float | Tensor) -> Tensor:
        is_target = _is_target_class(matched)
        logits = torch.where(is_target, -matched.logits, matched.logits)
        penalty = focal_penalty(logits, self.gamma)
        loss = torch.where(is_target, self.alpha * penalty, (1 - self.alpha) * penalty).sum(-1)
        loss = loss * _slot_weight(matched, self.unmatched_weight)
        return _sum_slots(loss, matched.is_real) / (matched.positives_per_object * num_objects)


@dataclass(frozen=True, kw_only=True)
class MatchabilityAware:
    """Matchability-aware loss (DEIM, 2412.04234) of every real slot and class.

    A matched slot must say its IoU with the object to the power of gamma; everything else is
    punished by its own probability to that power. Neither factor has a gradient.
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
        loss = loss * _slot_weight(matched, self.unmatched_weight)
        return _sum_slots(loss, matched.is_real) / (matched.positives_per_object * num_objects)


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Cross-entropy whose last class is "no object" (DETR, 2005.12872, appendix A.2).

    A weighted mean over the real slots: it knows neither `positives_per_object` nor `num_objects`.
    """

    unmatched_weight: float = 0.1

    def __call__(self, matched: Matched, _num_objects: float | Tensor) -> Tensor:
        label = torch.where(matched.is_positive, matched.labels, matched.logits.shape[-1] - 1)
        loss = -matched.logits.log_softmax(-1).gather(-1, label[..., None]).squeeze(-1)
        weight = _slot_weight(matched, self.unmatched_weight)
        total = _sum_slots(weight, matched.is_real)
        loss = _sum_slots(weight * loss, matched.is_real)
        return loss / torch.where(total > 0, total, 1)


@dataclass(frozen=True, kw_only=True)
class L1:
    """Sum of the distances of cx, cy, w and h to the object's."""

    def __call__(self, matched: Matched, num_objects: float | Tensor) -> Tensor:
        loss = (matched.boxes - matched.target_boxes).abs().sum(-1) * matched.target_scores
        return _sum_slots(loss, matched.is_positive) / (matched.positives_per_object * num_objects)


@dataclass(frozen=True, kw_only=True)
class GIoU:
    """One minus the generalized IoU (1902.09630) with the object's box."""

    def __call__(self, matched: Matched, num_objects: float | Tensor) -> Tensor:
        overlap = elementwise_generalized_iou(
            cxcywh_to_xyxy(matched.boxes), cxcywh_to_xyxy(matched.target_boxes)
        )
        loss = (1 - overlap) * matched.target_scores
        return _sum_slots(loss, matched.is_positive) / (matched.positives_per_object * num_objects)
