"""Multi-head attention to all unpadded memory tokens."""

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
    """Compute multi-head attention of q [B, Q, D], k [B, S, D] and v [B, S, C]: [B, Q, C].

    Args:
        padding: [B, S] bool, True for tokens that are masked out as keys.
        dropout: Dropout rate of the attention weights.
        prior: [B, heads, Q, S] added to the attention logits, or None.
    """
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = additive(~padding, q.dtype)[:, None, None]
    if prior is not None:
        # A prior that overflows half precision to -inf could mask out a whole row.
        mask = mask + prior.clamp(min=torch.finfo(q.dtype).min / 4).to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)


class DenseAttention(nn.Module):
    """Multi-head attention with its projections (1706.03762, sec. 3.2.2)."""

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
        """Return the update [B, Q, C].

        query [B, Q, C]; key and value [B, S, C]; padding and prior as in `attend_densely`.
        """
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
    """Cross-attention to all tokens; positions are added to queries and keys (2005.12872)."""

    def __init__(self, *, channels: int, num_heads: int, dropout: float):
        super().__init__()
        self.attention = DenseAttention(channels=channels, num_heads=num_heads, dropout=dropout)

    def forward(
        self, content: Tensor, position: Tensor, _reference: Tensor | None, memory: Memory
    ) -> Tensor:
        """Return the update [B, Q, C] from content and position [B, Q, C]; reference is unused."""
        keys = memory.tokens + memory.position
        return self.attention(content + position, keys, memory.tokens, memory.padding)


class SelfAttention(nn.Module):
    """Post-norm self-attention block; the position is added to queries and keys (2005.12872)."""

    def __init__(self, *, channels: int, num_heads: int, dropout: float):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"channels {channels} must be a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(channels)
        xavier_fused_([self.q, self.k, self.v])
        xavier_fused_([self.out])

    def forward(self, content: Tensor, position: Tensor, query_mask: QueryAttentionMask) -> Tensor:
        """Return the updated content [B, Q, C] from content and position, both [B, Q, C]."""
        with_position = content + position
        q, k, v = self.q(with_position), self.k(with_position), self.v(content)
        dropout = self.dropout.p if self.training else 0.0
        update = self.out(attend(q, k, v, self.num_heads, query_mask, dropout=dropout))
        return self.norm(content + self.dropout(update))


class SplitSelfAttention(nn.Module):
    """Post-norm self-attention block that adds separate projections of content and position.

    See 2108.06152, sec. 3.2.
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
        """Project content and position [B, Q, C] to attention queries [B, Q, C]."""
        return self.content_q(content) + self.position_q(position)

    def forward(self, content: Tensor, position: Tensor, query_mask: QueryAttentionMask) -> Tensor:
        """Return the updated content [B, Q, C] from content and position, both [B, Q, C]."""
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
    """Query positions of conditional cross-attention, both [B, Q, C].

    spatial is compared with the sine encoding of the tokens; learned, the position of
    self-attention, is used by the first layer only.
    """

    spatial: Tensor
    learned: Tensor


class ConditionalCrossAttention(nn.Module):
    """Conditional cross-attention: content and position concatenated per head.

    The attention logit is a content term plus a spatial term (2108.06152, sec. 3.3). With
    `is_first`, for the first layer, positions are also added to the content of queries and keys.
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
        """Return the update [B, Q, C] from content [B, Q, C]; reference is unused."""
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
        """Project content [B, Q, C] and memory to q [B, Q, 2 C], k [B, S, 2 C] and v [B, S, C]."""
        q, k = self.content_q(content), self.content_k(memory.tokens)
        position_k = self.position_k(memory.position)
        if self.learned_q is not None:
            q = q + self.learned_q(position.learned)
            k = k + position_k
        q = self.join(q, self.spatial_q(position.spatial))
        return q, self.join(k, position_k), self.v(memory.tokens)

    def join(self, content: Tensor, spatial: Tensor) -> Tensor:
        """Concatenate content and spatial [B, n, C] per head: [B, n, 2 C]."""
        parts = [x.unflatten(-1, (self.num_heads, -1)) for x in (content, spatial)]
        return torch.cat(parts, dim=-1).flatten(2)
