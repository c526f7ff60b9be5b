"""Sine position encodings of feature cells and query references, in at least float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sine(coordinates: Tensor, channels: int, temperature: float) -> Tensor:
    """Encode coordinates as interleaved sines and cosines (1706.03762, sec. 3.5).

    Args:
        coordinates: [...] in [0, 1].
        channels: Channels per coordinate, even.
        temperature: Base of the geometric series of wavelengths.

    Returns:
        [..., channels] float32 (float64 stays float64).
    """
    coordinates = coordinates if coordinates.dtype == torch.float64 else coordinates.float()
    index = torch.arange(channels // 2, device=coordinates.device, dtype=coordinates.dtype)
    frequency = temperature ** (-2 * index / channels)
    angle = coordinates[..., None] * (2 * math.pi) * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def sine_of_reference(reference: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """Encode points or boxes [..., R] in [0, 1] as [..., R * channels], in the order y, x, w, h.

    Order and temperature follow the code of Conditional DETR and DAB-DETR (the DAB-DETR paper uses
    temperature 20; 2201.12329, sec. 4.4).
    """
    encoded = sine(reference, channels, temperature)
    x, y = encoded[..., 0, :], encoded[..., 1, :]
    return torch.cat((y, x, encoded[..., 2:, :].flatten(-2)), dim=-1)


class SinePosition(nn.Module):
    """Sine position encoding of the cells of a feature map, y before x.

    Coordinates are normalised by the number of unpadded cells, so they do not depend on padding.

    Args:
        channels: C, half for each axis.
        temperature: See `sine`.
        cell_offset: -0.5 encodes cell centres (Deformable DETR); 0 counts cells from 1 (DETR).
    """

    def __init__(self, *, channels: int, temperature: float, cell_offset: float):
        super().__init__()
        self.channels = channels
        self.temperature = temperature
        self.cell_offset = cell_offset

    def forward(self, padding: Tensor) -> Tensor:
        """Return positions [B, h, w, C] from padding [B, h, w] bool."""
        inside = (~padding).int()
        axes = []
        for axis in (1, 2):
            # Integers, because float sums are not deterministic on a GPU.
            count = inside.cumsum(axis).float()
            last = count.narrow(axis, count.shape[axis] - 1, 1)
            axes.append((count + self.cell_offset) / (last + 1e-6))
        y, x = (sine(axis, self.channels // 2, self.temperature) for axis in axes)
        return torch.cat((y, x), dim=-1)
