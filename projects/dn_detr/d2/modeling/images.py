"""Normalization and padding of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pad_images(
    images: list[Tensor], multiple_of: int, height: int = 0, width: int = 0
) -> tuple[Tensor, Tensor]:
    """Join images on one canvas, each at its top left.

    Args:
        images: [3, h, w] each.
        multiple_of: what the sides of the canvas are rounded up to; 0 or 1: not at all.
        height, width: smallest canvas, in pixels.

    Returns:
        Images [B, 3, H, W], 0 outside; padding mask [B, H, W] bool, True outside.
    """
    step = max(1, multiple_of)
    height = -(-max(height, *(image.shape[-2] for image in images)) // step) * step
    width = -(-max(width, *(image.shape[-1] for image in images)) // step) * step
    padding = torch.ones(len(images), height, width, dtype=torch.bool, device=images[0].device)
    padded = []
    for image, outside in zip(images, padding, strict=True):
        h, w = image.shape[-2:]
        padded.append(F.pad(image, (0, width - w, 0, height - h)))
        outside[:h, :w] = False
    return torch.stack(padded), padding


def prepare(model: nn.Module, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Normalize images that already share a canvas, as a traceable function.

    Args:
        model: has `pixel_mean` and `pixel_std`, [3, 1, 1] each.
        images: [B, 3, H, W], each at the top left of its canvas; what lies outside does not matter.
        sizes: [B, 2] int64, (height, width) of each image in pixels.

    Returns:
        Normalized images [B, 3, H, W], 0 outside; padding mask [B, H, W] bool, True outside.
    """
    y, x = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    height, width = sizes[:, :, None, None].unbind(1)  # [B, 1, 1] each
    padding = (y[:, None] >= height) | (x >= width)
    normalised = (images - model.pixel_mean) / model.pixel_std
    return torch.where(padding[:, None], 0.0, normalised), padding
