"""Point sampling for mask losses: random points, most of them where the prediction is uncertain
(2112.01527, sec. 3.3; 1912.08193, sec. 3.2).

All predictions of an image share one set of candidate points, so that mask features and ground
truth are sampled once for all layers and segments. Mask logits at the points are products with the
embeddings; full masks are never computed. Each prediction selects its own uncertain candidates. The
points depend only on the noise seed of the image: not on resuming or on the rest of the batch.

Deviations from the published code: theirs draws separate candidates for each pair of prediction and
object (with the same distribution); points lie in the unpadded image only, and near its border
repeat the outermost cell instead of fading to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dn_detr.layers.point_sampling import random_points, sample_features, sample_masks
from dn_detr.structures import Assignment, MaskPoints, Predictions, Targets

CANDIDATES, RANDOM, MATCHING = range(3)
"""Random streams: candidates for uncertain points, uniform points, matching costs."""


@dataclass(frozen=True, kw_only=True)
class PointSampling:
    """Point sampling of the mask losses.

    Args:
        num_points: points per mask.
        oversample: number of candidates as a multiple of `num_points`.
        importance: fraction of the points that are the most uncertain candidates; the others are
            uniform.
    """

    num_points: int = 12544
    oversample: float = 3.0
    importance: float = 0.75

    def __post_init__(self) -> None:
        if self.num_points < 1 or self.oversample < 1 or not 0 <= self.importance <= 1:
            raise ValueError(
                "mask points need num_points >= 1, oversample >= 1 and importance in [0, 1], "
                f"got {self.num_points}, {self.oversample} and {self.importance}"
            )

    def sample(self, predictions: Predictions, targets: Targets) -> SampledMasks:
        """Sample what all segments of the predictions share; `targets` must have masks."""
        if predictions.mask_features is None or targets.masks is None:
            raise ValueError("mask losses need predictions and targets with masks")
        num_candidates = int(self.num_points * self.oversample)
        num_uncertain = int(self.num_points * self.importance)
        candidates = random_points(targets.noise_seeds, num_candidates, CANDIDATES)
        others = random_points(targets.noise_seeds, self.num_points - num_uncertain, RANDOM)
        points = torch.cat((candidates, others), dim=1)
        return SampledMasks(
            features=sample_features(predictions.mask_features, points),
            labels=_labels(targets, points),
            num_candidates=num_candidates,
            num_uncertain=num_uncertain,
            most_objects=max(targets.counts),
        )


def _labels(targets: Targets, points: Tensor) -> Tensor:
    """Ground truth [B, M, P] at points [B, P, 2], 0 for padding objects."""
    batch, most = targets.labels.shape
    labels = torch.zeros(batch, most, points.shape[1], device=points.device)
    for image, masks in enumerate(targets.masks):
        labels[image, : masks.shape[0]] = sample_masks(masks, points[image])
    return labels


@dataclass(frozen=True, eq=False)
class SampledMasks:
    """Features [B, C, P] and ground truth [B, M, P] at the points of a batch, candidates first."""

    features: Tensor
    labels: Tensor
    num_candidates: int
    num_uncertain: int
    most_objects: int

    def of(self, part: Predictions, assignment: Assignment, scores: Tensor | None) -> MaskPoints:
        """Sample the masks of the positive queries of a segment; scores: of targets [L, B, Q] or
        None.
        """
        segment = part.segments[0]
        limit = max(1, min(segment.size, round(self.most_objects * segment.positives_per_object)))
        queries = assignment.positive_slots(limit)  # [L, B, n]
        object_of = assignment.object_of.gather(2, queries)
        is_real = assignment.is_real.expand_as(assignment.object_of).gather(2, queries)
        is_positive = (object_of >= 0) & is_real
        channels = part.mask_embeddings.shape[-1]
        embeddings = part.mask_embeddings.gather(2, queries[..., None].expand(-1, -1, -1, channels))
        embeddings = torch.where(is_positive[..., None], embeddings.to(self.features.dtype), 0)
        # One layer at a time: logits at all candidates are large.
        layers = [
            self._choose(*layer)
            for layer in zip(embeddings.unbind(), object_of.clamp(min=0).unbind(), strict=True)
        ]
        logits, labels = (torch.stack(values) for values in zip(*layers, strict=True))
        scores = None if scores is None else scores.gather(2, queries)
        return MaskPoints(logits, labels, is_positive, scores)

    def _choose(self, embeddings: Tensor, object_of: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels [B, n, num_points] of embeddings [B, n, C] for objects [B, n]."""
        logits = embeddings @ self.features  # [B, n, P]
        index = object_of[..., None].expand(-1, -1, self.labels.shape[-1])
        labels = self.labels.gather(1, index).to(logits.dtype)
        certainty = logits.detach()[..., : self.num_candidates].abs()
        uncertain = certainty.topk(self.num_uncertain, largest=False, sorted=False).indices
        logits, labels = (
            torch.cat((values.gather(2, uncertain), values[..., self.num_candidates :]), dim=2)
            for values in (logits, labels)
        )
        return logits, labels
