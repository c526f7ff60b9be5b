"""Batches of images as tensors: normalisation and padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def prepare(model: nn.Module, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise images that already lie on one canvas.

    Args:
        model: has `pixel_mean` and `pixel_std`, [3, 1, 1] each.
        images: [B, 3, H, W], each at the top left of its canvas; what lies outside does not matter.
        sizes: [B, 2] int64, (height, width) of each image in pixels.

    Returns:
        Normalised images [B, 3, H, W], 0 outside; padding mask [B, H, W] bool, True outside.
    """
    y, x = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    height, width = sizes[:, :, None, None].unbind(1)  # [B, 1, 1] each
    padding = (y[:, None] >= height) | (x >= width)
    normalised = (images - model.pixel_mean) / model.pixel_std
    return torch.where(padding[:, None], 0.0, normalised), padding
