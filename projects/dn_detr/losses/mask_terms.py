"""Loss terms of masks: term(points of one segment, num_objects) -> losses of the layers [L]."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_detr.losses.mask_points import PointSampling
from dn_detr.structures import MaskPoints


@dataclass(frozen=True, kw_only=True)
class MaskTerms:
    """Mask losses of a criterion.

    Args:
        terms: name -> (term, weight).
        points: point sampling.
        without: names of the segments whose masks are not trained.
    """

    terms: Mapping[str, tuple[Callable[[MaskPoints, float | Tensor], Tensor], float]]
    points: PointSampling
    without: Collection[str] = ()


def _mean_over_objects(loss: Tensor, points: MaskPoints, num_objects: float | Tensor) -> Tensor:
    """Average the losses [L, B, n] of masks over the objects: [L]."""
    loss = loss if points.scores is None else loss * points.scores
    return torch.where(points.is_positive, loss, 0).sum(dim=(1, 2)) / num_objects


@dataclass(frozen=True, kw_only=True)
class MaskCrossEntropy:
    """Binary cross-entropy, averaged over the points of a mask: [L]."""

    def __call__(self, points: MaskPoints, num_objects: float | Tensor) -> Tensor:
        loss = F.softplus(points.logits) - points.logits * points.labels
        return _mean_over_objects(loss.mean(-1), points, num_objects)


@dataclass(frozen=True, kw_only=True)
class Dice:
    """Dice loss over the points of a mask (1606.04797, eq. 3): [L].

    One is added to numerator and denominator (2112.01527, code).
    """

    def __call__(self, points: MaskPoints, num_objects: float | Tensor) -> Tensor:
        probability = points.logits.sigmoid()
        both = (probability * points.labels).sum(-1)
        loss = 1 - (2 * both + 1) / (probability.sum(-1) + points.labels.sum(-1) + 1)
        return _mean_over_objects(loss, points, num_objects)
