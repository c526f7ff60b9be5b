"""Attention between queries: the only place that knows attention masks and folding.

Segments that see nothing else and are seen by none (Group DETR's further groups, or all matched
queries at inference) need no mask between each other: their groups are folded into the batch axis,
which saves a factor of the number of groups. They come last on the query axis, by construction.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dn_detr.ops.noise_objects import MASK_PITCH
from dn_detr.structures import Segment


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    query_mask: QueryAttentionMask,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Multi-head attention of queries [B, Q, C] to queries; v may be of another width. No gradient
    and no value passes between slots that do not see each other. dropout: of attention weights."""
    pieces = []
    for start, size, num_groups, mask in query_mask.parts:
        part = [x.narrow(1, start, size) for x in (q, k, v)]
        query, key, value = (fold(x, num_groups, num_heads) for x in part)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        pieces.append(unfold(out, num_groups))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def fold(x: Tensor, num_groups: int, num_heads: int) -> Tensor:
    """[B, G * n, C] -> [B * G, heads, n, C / heads]."""
    batch, queries, channels = x.shape
    x = x.reshape(batch * num_groups, queries // num_groups, num_heads, channels // num_heads)
    return x.transpose(1, 2)


def unfold(x: Tensor, num_groups: int) -> Tensor:
    """[B * G, heads, n, D] -> [B, G * n, heads * D]."""
    folded, heads, queries, width = x.shape
    x = x.transpose(1, 2).reshape(folded // num_groups, num_groups * queries, heads * width)
    return x


class QueryAttentionMask:
    """Which query sees which, built once per forward from the segments.

    `parts`: (start, size, groups to fold, additive mask [B or 1, 1, size, size] or None). Empty
    slots are no keys, but every slot sees itself, so that no row of the mask is all blocked.
    mask: the ready mask of `Queries`, for the segments that are not folded.
    """

    def __init__(
        self,
        segments: tuple[Segment, ...],
        *,
        device: torch.device,
        dtype: torch.dtype,
        mask: Tensor | None = None,
    ):
        self.parts: list[tuple[int, int, int, Tensor | None]] = []
        seen = {name for segment in segments for name in segment.attends_to}
        joined = [s for s in segments if s.attends_to or s.name in seen]
        folded = [s for s in segments if not (s.attends_to or s.name in seen)]
        if list(segments) != joined + folded:
            raise ValueError(
                "segments that see nothing else and are seen by none must come last, got "
                f"{[segment.name for segment in segments]}"
            )
        start = 0
        if joined:
            start = sum(segment.size for segment in joined)
            if mask is None:
                mask = additive_aligned(allowed_pairs(tuple(joined), device), dtype)
            self.parts.append((0, start, 1, mask.to(dtype)))
        for segment in folded:
            key_mask = None
            if segment.is_empty is not None:
                size = segment.size // segment.num_groups
                keys = ~segment.is_empty.reshape(-1, 1, 1, size)
                itself = torch.eye(size, dtype=torch.bool, device=device)
                key_mask = additive_aligned(keys | itself, dtype)
            if segment.size:
                self.parts.append((start, segment.size, segment.num_groups, key_mask))
            start += segment.size


def allowed_pairs(segments: tuple[Segment, ...], device: torch.device) -> Tensor:
    """[B or 1, 1, Q, Q] bool: True where the row's query may attend to the column's."""
    total = sum(segment.size for segment in segments)
    allowed = torch.zeros(total, total, dtype=torch.bool, device=device)
    ranges, start = {}, 0
    for segment in segments:
        ranges[segment.name] = slice(start, start + segment.size)
        start += segment.size
    for segment in segments:
        rows = ranges[segment.name]
        group = torch.arange(segment.size, device=device) // max(
            1, segment.size // segment.num_groups
        )
        allowed[rows, rows] = group[:, None] == group[None, :]
        for name in segment.attends_to:
            allowed[rows, ranges[name]] = True
    allowed = allowed[None, None]
    emptiness = [segment.is_empty for segment in segments]
    if any(is_empty is not None for is_empty in emptiness):
        batch = next(is_empty.shape[0] for is_empty in emptiness if is_empty is not None)
        is_empty = torch.cat(
            [
                torch.zeros(batch, s.size, dtype=torch.bool, device=device)
                if s.is_empty is None
                else s.is_empty
                for s in segments
            ],
            dim=1,
        )
        itself = torch.eye(total, dtype=torch.bool, device=device)
        allowed = (allowed & ~is_empty[:, None, None, :]) | itself
    return allowed


def attention_dtype(content: Tensor) -> torch.dtype:
    """The dtype that queries and keys of attention will have, so that a mask is made in it once."""
    kind = content.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else content.dtype


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, -inf elsewhere."""
    visible = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, visible, float("-inf"))


def additive_aligned(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """`additive` whose rows start at multiples of `MASK_PITCH` elements: efficient attention on
    CUDA pads and copies another mask in every layer."""
    size = allowed.shape[-1]
    return additive(F.pad(allowed, (0, -size % MASK_PITCH)), dtype)[..., :size]
