"""Matching costs of masks; see `losses.matching_costs`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_detr.layers.point_sampling import random_points, sample_features, sample_masks
from dn_detr.losses.mask_points import MATCHING
from dn_detr.losses.matching_costs import Objects
from dn_detr.structures import Predictions


@dataclass(frozen=True, kw_only=True)
class MaskCosts:
    """Mask costs at uniform random points (2112.01527, sec. 3.3), added to class and box costs.

    Args:
        others: class and box costs, as `Costs`.
        cross_entropy: weight of the binary cross-entropy.
        dice: weight of the Dice cost.
        num_points: points per image, shared by all queries and layers.
    """

    others: Callable[[Predictions, Objects], Tensor]
    cross_entropy: float = 5.0
    dice: float = 5.0
    num_points: int = 12544

    def __call__(self, predictions: Predictions, objects: Objects) -> Tensor:
        """Compute the cost of each object and query of its image: [L, T, Q]."""
        if predictions.mask_embeddings is None or objects.masks is None:
            raise ValueError("mask costs need predictions and targets with masks")
        others = self.others(predictions, objects)
        with torch.autocast(others.device.type, enabled=False):
            return others + self._of_masks(predictions, objects)

    def _of_masks(self, predictions: Predictions, objects: Objects) -> Tensor:
        points = random_points(objects.noise_seeds, self.num_points, MATCHING)
        features = sample_features(predictions.mask_features, points)  # [B, C, P]
        labels = [
            sample_masks(masks, at).to(features.dtype)
            for masks, at in zip(objects.masks, points, strict=True)
        ]
        layers = []
        for embeddings in predictions.mask_embeddings:  # one layer at a time to save memory
            logits = embeddings.to(features.dtype) @ features  # [B, Q, P]
            images = zip(logits, labels, strict=True)
            layers.append(torch.cat([self._of_image(*image) for image in images]))
        return torch.stack(layers)

    def _of_image(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Costs [n, Q] of logits [Q, P] and ground truth [n, P] of an image."""
        if labels.shape[0] == 0:
            return logits.new_zeros(0, logits.shape[0])
        # Cross-entropy is softplus(x) - label * x.
        cross_entropy = F.softplus(logits).mean(-1) - labels @ logits.T / logits.shape[1]
        probability = logits.sigmoid()
        both = 2 * (labels @ probability.T) + 1
        dice = 1 - both / (probability.sum(-1) + labels.sum(-1, keepdim=True) + 1)
        return self.cross_entropy * cross_entropy + self.dice * dice
