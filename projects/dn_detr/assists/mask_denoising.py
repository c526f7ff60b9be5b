"""Denoising of masks: masks of the ground truth, shifted, must be rebuilt (2203.01305, TPAMI version,
on Mask2Former).

A mask keeps its shape and size; it moves as the centre of its box does in box denoising.
"""

from __future__ import annotations

import torch

from dn_detr.assists.denoising import Denoise
from dn_detr.structures import NoisedObjects, QueryState, Targets


class DenoiseMasks(Denoise):
    """`Denoise` for queries that start from a mask. Targets must have masks.

    source: has `from_masks(labels [B, T], masks, object_of [B, T], shift [B, T, 2]) -> QueryState`,
    see `Targets.masks`; shift in shares of the image.
    """

    def describe(self, noised: NoisedObjects, source, targets: Targets) -> QueryState:
        if targets.masks is None:
            raise ValueError("denoising of masks needs targets with masks, got None")
        object_of = noised.assignment.clamp(min=0)
        boxes = targets.boxes.gather(1, object_of[..., None].expand(-1, -1, 4))
        shift = noised.boxes[..., :2] - boxes[..., :2]
        shift = torch.where(noised.is_empty[..., None], 0, shift)
        return source.from_masks(noised.labels, targets.masks, object_of, shift)
