"""Sine position encodings of image cells and of query coordinates, always in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sine(coordinates: Tensor, channels: int, temperature: float) -> Tensor:
    """Encode each coordinate by `channels` interleaved sines and cosines (1706.03762, sec. 3.5).

    coordinates [...] in [0, 1] -> [..., channels] float32 (float64 stays float64).
    """
    coordinates = coordinates if coordinates.dtype == torch.float64 else coordinates.float()
    index = torch.arange(channels // 2, device=coordinates.device, dtype=coordinates.dtype)
    frequency = temperature ** (-2 * index / channels)
    angle = coordinates[..., None] * (2 * math.pi) * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def sine_of_reference(reference: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """Encode points or boxes [..., R] in [0, 1] by `channels` each, in the order y, x, w, h.

    -> [..., R * channels]. The order and the temperature of 10000 are those of the code of
    Conditional DETR and DAB-DETR (the paper of the latter says 20, 2201.12329, sec. 4.4).
    """
    encoded = sine(reference, channels, temperature)
    x, y = encoded[..., 0, :], encoded[..., 1, :]
    return torch.cat((y, x, encoded[..., 2:, :].flatten(-2)), dim=-1)


class SinePosition(nn.Module):
    """Position of every cell of a map: padding [B, h, w] -> [B, h, w, C], y before x.

    Coordinates are counted over unpadded cells and divided by their number, so that they do not
    depend on the padding. `cell_offset` -0.5 puts cell centres between 0 and 1 (Deformable DETR);
    0 counts from 1 to n, as DETR does.
    """

    def __init__(self, *, channels: int, temperature: float, cell_offset: float):
        super().__init__()
        self.channels = channels
        self.temperature = temperature
        self.cell_offset = cell_offset

    def forward(self, padding: Tensor) -> Tensor:
        inside = (~padding).int()
        axes = []
        for axis in (1, 2):
            # Integers: on a GPU, sums of floats have no deterministic order.
            count = inside.cumsum(axis).float()
            last = count.narrow(axis, count.shape[axis] - 1, 1)
            axes.append((count + self.cell_offset) / (last + 1e-6))
        y, x = (sine(axis, self.channels // 2, self.temperature) for axis in axes)
        return torch.cat((y, x), dim=-1)
