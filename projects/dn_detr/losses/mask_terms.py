"""Loss terms of masks at `matched.mask_points` [L, B, n, P]; see `losses.loss_terms`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_detr.losses.mask_points import PointSampling
from dn_detr.protocols import LossTerm
from dn_detr.structures import Matched


@dataclass(frozen=True, kw_only=True)
class MaskTerms:
    """Mask losses of a criterion.

    Args:
        terms: name -> (term, weight).
        points: point sampling.
        without: names of the segments whose masks are not trained.
    """

    terms: Mapping[str, tuple[LossTerm, float]]
    points: PointSampling
    without: Collection[str] = ()


def _mean_over_objects(loss: Tensor, matched: Matched, num_objects: float | Tensor) -> Tensor:
    """Average the losses [L, B, n] of masks over the objects: [L]."""
    points = matched.mask_points
    loss = torch.where(points.is_positive, loss * points.scores, 0)
    return loss.sum(dim=(1, 2)) / (matched.positives_per_object * num_objects)


@dataclass(frozen=True, kw_only=True)
class MaskCrossEntropy:
    """Binary cross-entropy, averaged over the points of a mask: [L]."""

    def __call__(self, matched: Matched, num_objects: float | Tensor) -> Tensor:
        points = matched.mask_points
        loss = F.softplus(points.logits) - points.logits * points.labels
        return _mean_over_objects(loss.mean(-1), matched, num_objects)


@dataclass(frozen=True, kw_only=True)
class Dice:
    """Dice loss over the points of a mask (1606.04797, eq. 3): [L].

    One is added to numerator and denominator (2112.01527, code).
    """

    def __call__(self, matched: Matched, num_objects: float | Tensor) -> Tensor:
        points = matched.mask_points
        probability = points.logits.sigmoid()
        both = (probability * points.labels).sum(-1)
        loss = 1 - (2 * both + 1) / (probability.sum(-1) + points.labels.sum(-1) + 1)
        return _mean_over_objects(loss, matched, num_objects)
