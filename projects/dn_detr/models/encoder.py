"""Transformer encoders: Memory -> Memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dn_detr.layers.constants import made_once
from dn_detr.layers.mlp import FeedForward
from dn_detr.layers.multihead_attention import DenseAttention
from dn_detr.structures import Memory


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then feed-forward (2010.04159, sec. 4.1)."""

    def __init__(
        self, *, attention: nn.Module, feed_forward: FeedForward, channels: int, dropout: float
    ):
        super().__init__()
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(channels)
        self.feed_forward = feed_forward

    def forward(self, memory: Memory, reference: Tensor) -> Tensor:
        """Return the updated tokens [B, S, C]; reference [B, S, 2] from `token_centers`."""
        update = self.attention(memory.tokens + memory.position, reference, memory)
        return self.feed_forward(self.norm(memory.tokens + self.dropout(update)))


class DeformableEncoder(nn.Module):
    """Stack of `DeformableEncoderLayer`."""

    def __init__(self, layers: list[DeformableEncoderLayer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, memory: Memory) -> Memory:
        """Return the memory with updated tokens [B, S, C]."""
        reference = token_centers(memory)
        for layer in self.layers:
            memory = replace(memory, tokens=layer(memory, reference))
        return memory


class DenseEncoderLayer(nn.Module):
    """Self-attention of all tokens, then feed-forward (2005.12872, appendix A.3)."""

    def __init__(self, *, attention: DenseAttention, feed_forward: FeedForward, dropout: float):
        super().__init__()
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(attention.out.out_features)
        self.feed_forward = feed_forward

    def forward(self, memory: Memory) -> Tensor:
        """Return the updated tokens [B, S, C]."""
        with_position = memory.tokens + memory.position
        update = self.attention(with_position, with_position, memory.tokens, memory.padding)
        return self.feed_forward(self.norm(memory.tokens + self.dropout(update)))


class DenseEncoder(nn.Module):
    """Stack of `DenseEncoderLayer`."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, memory: Memory) -> Memory:
        """Return the memory with updated tokens [B, S, C]."""
        for layer in self.layers:
            memory = replace(memory, tokens=layer(memory))
        return memory


def token_centers(memory: Memory) -> Tensor:
    """Compute the centres [B, S, 2] (x, y) of the tokens in [0, 1] of the unpadded image.

    Tokens in the padding have coordinates above 1.
    """
    valid = memory.valid_sizes
    sides = [
        level.expand(-1, height * width, -1)
        for level, (height, width) in zip(valid.split(1, dim=1), memory.shapes, strict=True)
    ]
    return _cell_centers(memory.shapes, valid.dtype, valid.device) / torch.cat(sides, dim=1)


@made_once
def _cell_centers(
    shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Centres [S, 2] (x, y) of the cells of all levels, in cells."""
    centers = []
    for height, width in shapes:
        x = torch.arange(width, device=device, dtype=dtype) + 0.5
        y = torch.arange(height, device=device, dtype=dtype) + 0.5
        cells = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1)
        centers.append(cells.flatten(0, 1))
    return torch.cat(centers)
