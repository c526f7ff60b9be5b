"""Dense attention: from queries to every token of the memory that is not padding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dn_detr.layers.initialization import xavier_, xavier_fused_
from dn_detr.layers.query_attention import QueryAttentionMask, additive, attend
from dn_detr.structures import Memory


def attend_densely(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    padding: Tensor,
    *,
    dropout: float = 0.0,
    prior: Tensor | None = None,
) -> Tensor:
    """Multi-head attention of q [B, Q, D] to k [B, S, D] and v [B, S, C] -> [B, Q, C].

    padding [B, S] bool: tokens that are no keys; prior [B, heads, Q, S] or None: added to the
    logits of the attention.
    """
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = additive(~padding, q.dtype)[:, None, None]
    if prior is not None:
        # A prior that overflows half precision to -inf could block a whole row.
        mask = mask + prior.clamp(min=torch.finfo(q.dtype).min / 4).to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)


class DenseAttention(nn.Module):
    """Projections around `attend_densely` (1706.03762, sec. 3.2.2).

    query [B, Q, C], key and value [B, S, C], padding [B, S], prior [B, heads, Q, S] or None
    -> update [B, Q, C].
    """

    def __init__(self, *, channels: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))
        xavier_fused_([self.q, self.k, self.v])
        xavier_fused_([self.out])

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor,
        prior: Tensor | None = None,
    ) -> Tensor:
        attended = attend_densely(
            self.q(query),
            self.k(key),
            self.v(value),
            self.num_heads,
            padding,
            dropout=self.dropout if self.training else 0.0,
            prior=prior,
        )
        return self.out(attended)


class DenseCrossAttention(nn.Module):
    """Cross-attention of the stock layer to all tokens; positions are added (2005.12872)."""

    def __init__(self, *, channels: int, num_heads: int, dropout: float):
        super().__init__()
        self.attention = DenseAttention(channels=channels, num_heads=num_heads, dropout=dropout)

    def forward(
        self, content: Tensor, position: Tensor, _reference: Tensor | None, memory: Memory
    ) -> Tensor:
        keys = memory.tokens + memory.position
        return self.attention(content + position, keys, memory.tokens, memory.padding)


class SplitSelfAttention(nn.Module):
    """Residual self-attention between queries in which content and position have projections of
    their own, whose outputs are added (2108.06152, sec. 3.2); a norm follows the residual.

    content, position [B, Q, C] -> [B, Q, C].
    """

    def __init__(self, *, channels: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.content_q, self.content_k, self.v, self.position_q, self.position_k, self.out = (
            nn.Linear(channels, channels) for _ in range(6)
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(channels)
        xavier_(self)
        nn.init.zeros_(self.out.bias)

    def query(self, content: Tensor, position: Tensor) -> Tensor:
        """What a query [B, Q, C] asks the others."""
        return self.content_q(content) + self.position_q(position)

    def forward(self, content: Tensor, position: Tensor, query_mask: QueryAttentionMask) -> Tensor:
        attended = attend(
            self.query(content, position),
            self.content_k(content) + self.position_k(position),
            self.v(content),
            self.num_heads,
            query_mask,
            dropout=self.dropout.p if self.training else 0.0,
        )
        return self.norm(content + self.dropout(self.out(attended)))


class ConditionalPosition(NamedTuple):
    """What conditional cross-attention needs to know of a query's place, both [B, Q, C]: spatial,
    compared with the sines of the tokens; learned, as in self-attention, for the first layer."""

    spatial: Tensor
    learned: Tensor


class ConditionalCrossAttention(nn.Module):
    """Cross-attention that compares content with content and place with place: in every head, the
    two are concatenated (2108.06152, sec. 3.3).

    is_first: in the first layer, whose content says nothing yet, the learned position is added to
    the content of the query, and the position of the token to that of the key.
    """

    def __init__(self, *, channels: int, num_heads: int, dropout: float, is_first: bool):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.content_q, self.spatial_q, self.content_k, self.position_k, self.v, self.out = (
            nn.Linear(channels, channels) for _ in range(6)
        )
        self.learned_q = nn.Linear(channels, channels) if is_first else None
        xavier_(self)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        content: Tensor,
        position: ConditionalPosition,
        _reference: Tensor | None,
        memory: Memory,
    ) -> Tensor:
        attended = attend_densely(
            *self.project(content, position, memory),
            self.num_heads,
            memory.padding,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.out(attended)

    def project(
        self, content: Tensor, position: ConditionalPosition, memory: Memory
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, Q, 2 C], k [B, S, 2 C] and v [B, S, C]."""
        q, k = self.content_q(content), self.content_k(memory.tokens)
        place = self.position_k(memory.position)
        if self.learned_q is not None:
            q = q + self.learned_q(position.learned)
            k = k + place
        q = self.join(q, self.spatial_q(position.spatial))
        return q, self.join(k, place), self.v(memory.tokens)

    def join(self, content: Tensor, place: Tensor) -> Tensor:
        """Concatenate [B, n, C] and [B, n, C] head by head: [B, n, 2 C]."""
        parts = [x.unflatten(-1, (self.num_heads, -1)) for x in (content, place)]
        return torch.cat(parts, dim=-1).flatten(2)
