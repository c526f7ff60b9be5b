"""Sine position encodings of feature cells and query references, in at least float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dn_detr.layers.constants import made_once


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
    frequency, phase = _waves(channels, temperature, coordinates.dtype, coordinates.device)
    return torch.addcmul(phase, coordinates[..., None], frequency).sin()


@made_once
def _waves(channels: int, temperature: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Angular frequency and phase of each channel, [2, channels]; cos x = sin(x + pi / 2)."""
    index = torch.arange(channels // 2, device=device, dtype=dtype).repeat_interleave(2)
    frequency = 2 * math.pi * temperature ** (-2 * index / channels)
    phase = torch.tensor([0, math.pi / 2], device=device, dtype=dtype).repeat(channels // 2)
    return torch.stack((frequency, phase))


def sine_of_reference(reference: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """Encode points or boxes [..., R] in [0, 1] as [..., R * channels], in the order y, x, w, h.

    Order and temperature follow the code of Conditional DETR and DAB-DETR (the DAB-DETR paper uses
    temperature 20; 2201.12329, sec. 4.4).
    """
    x, y, *size = reference.split(1, dim=-1)
    return sine(torch.cat((y, x, *size), dim=-1), channels, temperature).flatten(-2)


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

    def forward(self, *paddings: Tensor) -> Tensor:
        """Return positions [B, S, C] of the cells of levels of padding [B, h, w] bool."""
        counts, totals = [], []
        for padding in paddings:
            inside = ~padding
            for axis in (1, 2):
                # Integers, because float sums are not deterministic on a GPU.
                count = inside.cumsum(axis)
                last = count.narrow(axis, count.shape[axis] - 1, 1)
                counts.append(count.flatten(1))
                totals.append(last.expand_as(count).flatten(1))
        y, x = torch.cat(counts[::2], dim=1), torch.cat(counts[1::2], dim=1)
        last = torch.stack((torch.cat(totals[::2], dim=1), torch.cat(totals[1::2], dim=1)), dim=-1)
        axes = (torch.stack((y, x), dim=-1).float() + self.cell_offset) / (last.float() + 1e-6)
        return sine(axes, self.channels // 2, self.temperature).flatten(-2)
