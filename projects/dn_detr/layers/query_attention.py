"""Masked self-attention between queries.

Independent segments neither attend to others nor are attended to (Group DETR's extra groups, or all
matched queries at inference). Their groups need no mask: they are folded into the batch axis, which
divides the cost by the number of groups. Independent segments come last on the query axis.
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
    """Compute masked multi-head self-attention of q, k [B, Q, C] and v [B, Q, D]: [B, Q, D].

    Neither values nor gradients pass between queries that the mask separates. `dropout` is the rate
    of the attention weights.
    """
    outputs = []
    for start, size, num_groups, mask in query_mask.parts:
        # The gradient of a narrowed tensor is one more copy, even if it is narrowed to all of it.
        part = [x if size == x.shape[1] else x.narrow(1, start, size) for x in (q, k, v)]
        query, key, value = (fold(x, num_groups, num_heads) for x in part)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        outputs.append(unfold(out, num_groups))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def fold(x: Tensor, num_groups: int, num_heads: int) -> Tensor:
    """Fold groups into the batch axis: [B, G * n, C] -> [B * G, heads, n, C / heads]."""
    batch, queries, channels = x.shape
    x = x.reshape(batch * num_groups, queries // num_groups, num_heads, channels // num_heads)
    return x.transpose(1, 2)


def unfold(x: Tensor, num_groups: int) -> Tensor:
    """Undo `fold`: [B * G, heads, n, D] -> [B, G * n, heads * D]."""
    folded, heads, queries, width = x.shape
    x = x.transpose(1, 2).reshape(folded // num_groups, num_groups * queries, heads * width)
    return x


class QueryAttentionMask:
    """Self-attention mask of the queries, built once per forward from the segments.

    Empty queries are masked out as keys. Every query attends to itself, so that no row of the mask
    is fully masked out.

    Args:
        segments: Segments of the query axis, independent ones last.
        mask: [B or 1, 1, n, n] additive mask of the n queries of the other segments
            (`Queries.mask`), or None to derive it.

    Attributes:
        parts: Tuples (start, size, number of groups to fold, additive mask
            [B or 1, 1, size, size] or None).
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
        attended = {name for segment in segments for name in segment.attends_to}
        joined = [s for s in segments if s.attends_to or s.name in attended]
        folded = [s for s in segments if not (s.attends_to or s.name in attended)]
        if list(segments) != joined + folded:
            raise ValueError(
                "segments that neither attend to others nor are attended to must come last, got "
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
                diagonal = torch.eye(size, dtype=torch.bool, device=device)
                key_mask = additive_aligned(keys | diagonal, dtype)
            if segment.size:
                self.parts.append((start, segment.size, segment.num_groups, key_mask))
            start += segment.size


def allowed_pairs(segments: tuple[Segment, ...], device: torch.device) -> Tensor:
    """Build the mask [B or 1, 1, Q, Q] bool, True where the row may attend to the column."""
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
    empty_masks = [segment.is_empty for segment in segments]
    if any(is_empty is not None for is_empty in empty_masks):
        batch = next(is_empty.shape[0] for is_empty in empty_masks if is_empty is not None)
        is_empty = torch.cat(
            [
                torch.zeros(batch, s.size, dtype=torch.bool, device=device)
                if s.is_empty is None
                else s.is_empty
                for s in segments
            ],
            dim=1,
        )
        diagonal = torch.eye(total, dtype=torch.bool, device=device)
        allowed = (allowed & ~is_empty[:, None, None, :]) | diagonal
    return allowed


def attention_dtype(content: Tensor) -> torch.dtype:
    """Return the dtype of attention queries and keys (autocast included) for content [B, Q, C]."""
    kind = content.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else content.dtype


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a bool mask [...] to an additive one: 0 where allowed, else -inf."""
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, float("-inf"))


def additive_aligned(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Like `additive`, for [..., n, n], with rows that start at multiples of `MASK_PITCH` elements.

    Otherwise memory-efficient attention on CUDA pads and copies the mask in every layer.
    """
    size = allowed.shape[-1]
    return additive(F.pad(allowed, (0, -size % MASK_PITCH)), dtype)[..., :size]
