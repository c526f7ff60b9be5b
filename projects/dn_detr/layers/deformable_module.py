"""Multi-scale deformable attention as a module (2010.04159)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.ops.deformable_attention import deformable_attention
from dn_detr.structures import Memory


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention with its projections (2010.04159, eq. 3).

    Samples num_points points per head and level; padded tokens count as zero. Offsets from a point
    are in cells, offsets from a box in half box sizes divided by num_points.
    """

    def __init__(self, *, channels: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"channels {channels} must be a multiple of num_heads {num_heads}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(channels, samples * 2)
        self.attention_weights = nn.Linear(channels, samples)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(self._initial_offsets().flatten())

    def _initial_offsets(self) -> Tensor:
        """One direction per head, point p at distance p + 1 (Chebyshev): [heads, levels, P, 2]."""
        angle = torch.arange(self.num_heads) * (2 * torch.pi / self.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1)
        offsets = direction[:, None, None, :] * distance[None, None, :, None]
        return offsets.expand(-1, self.num_levels, -1, -1)

    def forward(self, query: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """Attend to the memory around the references.

        Args:
            query: [B, Q, C], position included.
            reference: [B, Q, 2 or 4] in [0, 1] of the unpadded image, or one per level,
                [B, Q, levels, 2 or 4].
            memory: S tokens of all levels.

        Returns:
            Update [B, Q, C].
        """
        batch, queries, _ = query.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        value = self.value_proj(memory.tokens).unflatten(-1, (heads, -1))
        offsets = self.sampling_offsets(query).reshape(batch, queries, heads, levels, points, 2)
        logits = self.attention_weights(query).reshape(batch, queries, heads, levels * points)
        sampled = deformable_attention(
            value, memory.shapes, memory.valid_sizes, reference, offsets, logits, memory.padding
        )
        return self.output_proj(sampled)
