"""What it costs to give a slot an object with a mask: see `losses.costs`."""

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
    """Costs of class and box, as `others` has them, plus those of the mask: cross-entropy and Dice
    at `num_points` uniform points, the same for all slots and layers (2112.01527, sec. 3.3)."""

    others: Callable[[Predictions, Objects], Tensor]
    cross_entropy: float = 5.0
    dice: float = 5.0
    num_points: int = 12544

    def __call__(self, predictions: Predictions, objects: Objects) -> Tensor:
        """Cost of every slot for every object of its image: [L, T, Q], float32 or float64."""
        if predictions.mask_embeddings is None or objects.masks is None:
            raise ValueError("costs of masks need predictions and targets with masks")
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
        for embeddings in predictions.mask_embeddings:  # one layer at a time, for memory's sake
            logits = embeddings.to(features.dtype) @ features  # [B, Q, P]
            images = zip(logits, labels, strict=True)
            layers.append(torch.cat([self._of_image(*image) for image in images]))
        return torch.stack(layers)

    def _of_image(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [Q, P] of an image beside its ground truth [n, P] -> [n, Q]."""
        if labels.shape[0] == 0:
            return logits.new_zeros(0, logits.shape[0])
        # Cross-entropy is softplus(x) - label * x.
        cross_entropy = F.softplus(logits).mean(-1) - labels @ logits.T / logits.shape[1]
        probability = logits.sigmoid()
        both = 2 * (labels @ probability.T) + 1
        dice = 1 - both / (probability.sum(-1) + labels.sum(-1, keepdim=True) + 1)
        return self.cross_entropy * cross_entropy + self.dice * dice
