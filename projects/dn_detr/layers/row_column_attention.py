"""Row-column decoupled attention (Anchor DETR, 2109.07107, sec. 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.layers.initialization import xavier_fused_
from dn_detr.layers.query_attention import additive


class RowColumnAttention(nn.Module):
    """Attention over the columns, then over the rows of a feature map.

    Keys are the means of columns and rows. The weight of a cell is the product of its column and
    row weights, so memory grows with h + w instead of h * w. Padded cells are masked out as keys
    and excluded from the means.
    """

    as_published = False
    """Include padded cells in the means."""

    def __init__(self, *, channels: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = nn.Dropout(dropout)
        self.x_q, self.y_q, self.x_k, self.y_k, self.v, self.out = (
            nn.Linear(channels, channels) for _ in range(6)
        )
        xavier_fused_([self.x_q, self.y_q, self.x_k, self.y_k, self.v])
        self.out.bias.data.zero_()

    def forward(
        self,
        query: Tensor,
        query_position: tuple[Tensor, Tensor],
        tokens: Tensor,
        axis_position: tuple[Tensor, Tensor],
        padding: Tensor,
    ) -> Tensor:
        """Attend to the feature map.

        Args:
            query: [B, Q, C].
            query_position: Positions of the queries for x and y, [B, Q, C] each.
            tokens: [B, h, w, C].
            axis_position: Positions of the columns [B, w, C] and rows [B, h, C].
            padding: [B, h, w] bool.

        Returns:
            Update [B, Q, C].
        """
        outside = padding & (not self.as_published)
        inside = (~outside)[..., None].to(tokens.dtype)
        kept = tokens.masked_fill(outside[..., None], 0)
        columns = kept.sum(1) / inside.sum(1).clamp(min=1)
        rows = kept.sum(2) / inside.sum(2).clamp(min=1)
        along_x = self.weights(
            self.x_q(query + query_position[0]),
            self.x_k(columns + axis_position[0]),
            padding.all(1),
        )
        along_y = self.weights(
            self.y_q(query + query_position[1]), self.y_k(rows + axis_position[1]), padding.all(2)
        )
        value = self.v(tokens).unflatten(-1, (self.num_heads, -1))  # [B, h, w, heads, D]
        sampled = torch.einsum("bnqw,bhwnd->bnqhd", along_x, value)
        update = torch.einsum("bnqh,bnqhd->bqnd", along_y, sampled)
        return self.out(update.flatten(2))

    def weights(self, q: Tensor, k: Tensor, is_outside: Tensor) -> Tensor:
        """Return weights [B, heads, Q, n] of q [B, Q, C] over k [B, n, C] inside the map."""
        q, k = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        scores = scores + additive(~is_outside, scores.dtype)[:, None, None]
        return self.dropout(scores.softmax(-1))
