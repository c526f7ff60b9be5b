"""Masks are compared with the ground truth at random points, most of them where the prediction is
unsure (2112.01527, sec. 3.3; 1912.08193, sec. 3.2).

All predictions of an image share one set of candidate points, so that the mask features and the ground
truth are sampled once, for all layers and segments; masks at the points are products with the
embeddings, and no whole mask is ever made. Which of the candidates count is each prediction's own
matter. The points follow from the image's noise key alone: they are the same after a resume, and
whatever else is in the batch.

Deviations from the published code: there, each pair of prediction and object draws candidates of its
own (each pair's are as uniform and independent here); points lie in the unpadded image only, and
near its border take the outermost cell instead of fading to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dn_detr.layers.point_sampling import random_points, sample_features, sample_masks
from dn_detr.structures import Assignment, MaskPoints, Predictions, Targets

CANDIDATES, RANDOM, MATCHING = range(3)
"""Streams of random points: to choose the unsure from, taken in any case, for the matching costs."""


@dataclass(frozen=True, kw_only=True)
class PointSampling:
    """num_points for each mask: the share `importance` of them are the most unsure of oversample *
    num_points candidates, the others uniform."""

    num_points: int = 12544
    oversample: float = 3.0
    importance: float = 0.75

    def __post_init__(self) -> None:
        if self.num_points < 1 or self.oversample < 1 or not 0 <= self.importance <= 1:
            raise ValueError(
                "points of masks need num_points >= 1, oversample >= 1 and importance in [0, 1], "
                f"got {self.num_points}, {self.oversample} and {self.importance}"
            )

    def sample(self, predictions: Predictions, targets: Targets) -> SampledMasks:
        """What all segments of these predictions share. `targets` must have masks."""
        if predictions.mask_features is None or targets.masks is None:
            raise ValueError("losses of masks need predictions and targets with masks")
        num_candidates = int(self.num_points * self.oversample)
        num_unsure = int(self.num_points * self.importance)
        candidates = random_points(targets.noise_seeds, num_candidates, CANDIDATES)
        others = random_points(targets.noise_seeds, self.num_points - num_unsure, RANDOM)
        points = torch.cat((candidates, others), dim=1)
        return SampledMasks(
            features=sample_features(predictions.mask_features, points),
            labels=_labels(targets, points),
            num_candidates=num_candidates,
            num_unsure=num_unsure,
            most_objects=max(targets.counts),
        )


def _labels(targets: Targets, points: Tensor) -> Tensor:
    """Ground truth at points [B, P, 2] -> [B, M, P], 0 where there is no object."""
    batch, most = targets.labels.shape
    labels = torch.zeros(batch, most, points.shape[1], device=points.device)
    for image, masks in enumerate(targets.masks):
        labels[image, : masks.shape[0]] = sample_masks(masks, points[image])
    return labels


@dataclass(frozen=True, eq=False)
class SampledMasks:
    """Features [B, C, P] and ground truth [B, M, P] at the points of a batch: candidates first."""

    features: Tensor
    labels: Tensor
    num_candidates: int
    num_unsure: int
    most_objects: int

    def of(self, part: Predictions, assignment: Assignment, scores: Tensor) -> MaskPoints:
        """Masks of one segment's positive slots. scores [L, B, q]: of their targets."""
        segment = part.segments[0]
        limit = max(1, min(segment.size, round(self.most_objects * segment.positives_per_object)))
        slots = assignment.positive_slots(limit)  # [L, B, n]
        object_of = assignment.object_of.gather(2, slots)
        is_real = assignment.is_real.expand_as(assignment.object_of).gather(2, slots)
        is_positive = (object_of >= 0) & is_real
        channels = part.mask_embeddings.shape[-1]
        embeddings = part.mask_embeddings.gather(2, slots[..., None].expand(-1, -1, -1, channels))
        embeddings = torch.where(is_positive[..., None], embeddings.to(self.features.dtype), 0)
        # One layer at a time: masks at all candidates are large, those at the chosen points less so.
        layers = [
            self._choose(*layer)
            for layer in zip(embeddings.unbind(), object_of.clamp(min=0).unbind(), strict=True)
        ]
        logits, labels = (torch.stack(values) for values in zip(*layers, strict=True))
        return MaskPoints(logits, labels, is_positive, scores.gather(2, slots))

    def _choose(self, embeddings: Tensor, object_of: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, n, C] of objects [B, n] -> logits and labels [B, n, num_points]."""
        logits = embeddings @ self.features  # [B, n, P]
        index = object_of[..., None].expand(-1, -1, self.labels.shape[-1])
        labels = self.labels.gather(1, index).to(logits.dtype)
        certainty = logits.detach()[..., : self.num_candidates].abs()
        unsure = certainty.topk(self.num_unsure, largest=False, sorted=False).indices
        logits, labels = (
            torch.cat((values.gather(2, unsure), values[..., self.num_candidates :]), dim=2)
            for values in (logits, labels)
        )
        return logits, labels
