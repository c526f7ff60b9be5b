"""Deformable attention from reference, raw offsets and raw logits (2010.04159, eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dn_detr.ops.ms_deform_attn import ms_deform_attn


def deformable_attention(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    valid_sizes: Tensor,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding: Tensor | None,
) -> Tensor:
    """Sample `value` around the references, weighted by the softmax of `logits` -> [B, Q, H * D].

    value [B, S, H, D]; shapes: (h, w) of each level, host integers; valid_sizes [B, levels, 2]:
    (w, h) of the unpadded part in cells; reference [B, Q, 2 or 4] in [0, 1] of the unpadded image;
    offsets [B, Q, H, levels, P, 2]: in cells from a point, in half box sizes over P from a box;
    logits [B, Q, H, levels * P]; padding [B, S] bool: tokens that count as zero, or None.

    Coordinates are computed in float32 (float64 where the reference is) whatever the value's type.
    """
    levels, points = offsets.shape[3], offsets.shape[4]
    if reference.shape[-1] not in (2, 4):
        raise ValueError(f"reference must be [B, Q, 2 or 4], got {list(reference.shape)}")
    if len(shapes) != levels or valid_sizes.shape[1] != levels:
        raise ValueError(
            f"offsets are for {levels} levels, got {len(shapes)} shapes and "
            f"{valid_sizes.shape[1]} valid sizes"
        )
    if padding is not None:
        value = value.masked_fill(padding[:, :, None, None], 0.0)
    precise = torch.float64 if reference.dtype == torch.float64 else torch.float32
    valid = valid_sizes.to(precise)[:, None, None, :, None]
    reference = reference.to(precise)[:, :, None, None, None]
    offsets = offsets.to(precise)
    if reference.shape[-1] == 2:
        cells = reference * valid + offsets
    else:
        cells = (reference[..., :2] + offsets * reference[..., 2:] * (0.5 / points)) * valid
    x = torch.stack([cells[..., i, :, 0] / w for i, (_, w) in enumerate(shapes)], dim=-2)
    y = torch.stack([cells[..., i, :, 1] / h for i, (h, _) in enumerate(shapes)], dim=-2)
    weights = logits.to(precise).softmax(dim=-1).unflatten(-1, (levels, points))
    return ms_deform_attn(value, shapes, torch.stack((x, y), dim=-1), weights)
