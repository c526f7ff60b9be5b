"""Row-column decoupled attention (Anchor DETR, 2109.07107, sec. 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.layers.initialization import xavier_fused_
from dn_detr.layers.query_attention import additive


class RowColumnAttention(nn.Module):
    """Attention to the columns and to the rows of a map, one after the other, instead of to all
    cells: a query chooses x among the columns' means and y among the rows' means.

    The score of a cell is the product of both, so that memory grows with h + w rather than h * w.
    Padded cells are neither keys nor part of a mean.
    """

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
        """-> update [B, Q, C].

        query [B, Q, C] with its positions for x and y, [B, Q, C] each; tokens [B, h, w, C] with the
        positions of the columns [B, w, C] and of the rows [B, h, C]; padding [B, h, w] bool.
        """
        inside = (~padding)[..., None].to(tokens.dtype)
        kept = tokens.masked_fill(padding[..., None], 0)
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
        picked = torch.einsum("bnqw,bhwnd->bnqhd", along_x, value)
        update = torch.einsum("bnqh,bnqhd->bqnd", along_y, picked)
        return self.out(update.flatten(2))

    def weights(self, q: Tensor, k: Tensor, is_outside: Tensor) -> Tensor:
        """Softmax weights [B, heads, Q, n] of q [B, Q, C] over k [B, n, C]."""
        q, k = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        scores = scores + additive(~is_outside, scores.dtype)[:, None, None]
        return self.dropout(scores.softmax(-1))
