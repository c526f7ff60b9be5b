"""Query positions, recomputed in every decoder layer.

Protocol: forward(layer index, content [B, Q, C], reference [B, Q, R] or None, learned position
[B, Q, C] or None, memory) -> positions for self-attention [B, Q, C] and for cross-attention
([B, Q, C], or a `ConditionalPosition`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.layers.initialization import xavier_
from dn_detr.layers.mlp import MLP
from dn_detr.layers.multihead_attention import ConditionalPosition
from dn_detr.layers.position_encoding import sine_of_reference
from dn_detr.structures import Memory

SMALLEST_SIDE = 1e-4
"""Lower bound of widths and heights, so that modulation does not overflow half precision."""


class BoxPosition(nn.Module):
    """Query position MLP(sine(box)) for self- and cross-attention (2201.12329, sec. 4.2).

    Args:
        scales_with_content: From the second layer on, multiply the position by an MLP of the
            content (sec. 4.3).
    """

    as_published = False
    """Scale the box by the unpadded fraction of the finest level (DAB-Deformable-DETR, DINO)."""

    def __init__(self, *, channels: int, scales_with_content: bool):
        super().__init__()
        self.channels = channels
        self.box_mlp = MLP(in_dim=2 * channels, hidden_dim=channels, out_dim=channels, num_layers=2)
        self.scale = None
        if scales_with_content:
            self.scale = MLP(in_dim=channels, hidden_dim=channels, out_dim=channels, num_layers=2)
        xavier_(self)

    def forward(
        self, layer: int, content: Tensor, reference: Tensor, _learned: None, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """Return the position [B, Q, C] twice, from content [B, Q, C] and reference [B, Q, 4]."""
        if self.as_published:
            height, width = memory.shapes[0]
            valid_width, valid_height = memory.valid_sizes[:, 0].unbind(-1)
            ratio = torch.stack((valid_width / width, valid_height / height), dim=-1)
            reference = reference * ratio.repeat(1, 2)[:, None]
        encoded = sine_of_reference(reference, self.channels // 2)
        position = self.box_mlp(encoded.to(content.dtype))
        if layer > 0 and self.scale is not None:
            position = position * self.scale(content)
        return position, position


class LearnedPosition(nn.Module):
    """Learned query position, the same in every layer, for self- and cross-attention."""

    def forward(
        self, _layer: int, _content: Tensor, _reference: Tensor, learned: Tensor, _memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """Return learned [B, Q, C] twice."""
        return learned, learned


class ModulatedBoxPosition(nn.Module):
    """Query positions from the reference box, modulated by its size (2201.12329, sec. 4.2-4.4)."""

    def __init__(self, *, channels: int):
        super().__init__()
        self.channels = channels
        self.box_mlp = MLP(in_dim=2 * channels, hidden_dim=channels, out_dim=channels, num_layers=2)
        self.scale = MLP(in_dim=channels, hidden_dim=channels, out_dim=channels, num_layers=2)
        self.size = MLP(in_dim=channels, hidden_dim=channels, out_dim=2, num_layers=2)
        xavier_(self)

    def forward(
        self, layer: int, content: Tensor, reference: Tensor, _learned: None, _memory: Memory
    ) -> tuple[Tensor, ConditionalPosition]:
        """Return positions [B, Q, C] from content [B, Q, C] and reference [B, Q, 4]."""
        encoded = sine_of_reference(reference, self.channels // 2)  # y, x, w, h
        for_self = self.box_mlp(encoded.to(content.dtype))
        width, height = reference[..., 2:].clamp(min=SMALLEST_SIDE).split(1, dim=-1)
        reference_width, reference_height = self.size(content).sigmoid().split(1, dim=-1)
        y, x = encoded[..., : self.channels].chunk(2, dim=-1)
        modulated = torch.cat(
            (y * (reference_height / height), x * (reference_width / width)), dim=-1
        )
        spatial = modulated.to(content.dtype)
        if layer > 0:
            spatial = spatial * self.scale(content)
        return for_self, ConditionalPosition(spatial=spatial, learned=for_self)
