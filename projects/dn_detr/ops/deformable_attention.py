"""Deformable attention from references, raw offsets and attention logits (2010.04159, eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from dn_detr.ops.extension import KERNELS, use_kernel
from dn_detr.ops.ms_deform_attn import check_value, ms_deform_attn_pytorch


def deformable_attention(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    valid_sizes: Tensor,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding: Tensor | None,
) -> Tensor:
    """Sample values around the references and sum them with softmax weights.

    Sampling is that of `grid_sample(align_corners=False, padding_mode="zeros")`; locations outside,
    infinite or NaN contribute nothing and get no gradient. Computes in float32 (float64 for float64
    values). Gradients have the dtype of their inputs; valid_sizes gets none. Not twice
    differentiable.

    Args:
        value: [B, S, H, D] float32, float16, bfloat16 or float64; levels fine to coarse.
        shapes: (h, w) of each level as host integers, sum of h * w = S.
        valid_sizes: [B, levels, 2], (w, h) of the unpadded part in cells.
        reference: [B, Q, 2 or 4] in [0, 1] of the unpadded image, or one per level,
            [B, Q, levels, 2 or 4].
        offsets: [B, Q, H, levels, P, 2]; in cells from a point, in half box sizes divided by P
            from a box.
        logits: [B, Q, H, levels * P].
        padding: [B, S] bool, tokens that count as zero, or None.

    Returns:
        [B, Q, H * D] in the dtype of value.

    Raises:
        ValueError: If shapes or dtypes do not match.
    """
    precise = torch.float64 if value.dtype == torch.float64 else torch.float32
    valid_sizes, reference = valid_sizes.detach().to(precise), reference.to(precise)
    if offsets.dtype != logits.dtype or offsets.dtype not in (value.dtype, precise):
        offsets, logits = offsets.to(precise), logits.to(precise)
    if use_kernel("deformable_attention", value.device):
        sides = [side for shape in shapes for side in shape]
        return torch.ops.dn_detr.deformable_attention(
            value, sides, valid_sizes, reference, offsets, logits, padding
        )
    return deformable_attention_pytorch(
        value, shapes, valid_sizes, reference, offsets, logits, padding
    )


def deformable_attention_pytorch(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    valid_sizes: Tensor,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding: Tensor | None,
) -> Tensor:
    """Reference implementation of `deformable_attention` in PyTorch, also used for ONNX export.

    Same arguments and result, [B, Q, H * D]. The one difference: an infinite or NaN offset from a
    box makes the gradient of the box NaN.
    """
    _check(value, shapes, valid_sizes, reference, offsets, logits, padding)
    precise = torch.float64 if value.dtype == torch.float64 else torch.float32
    levels, points = offsets.shape[3], offsets.shape[4]
    if padding is not None:
        value = value.masked_fill(padding[:, :, None, None], 0.0)
    valid = valid_sizes.detach().to(precise)[:, None, None, :, None]
    if reference.ndim == 3:
        reference = reference[:, :, None]
    reference = reference.to(precise)[:, :, None, :, None]  # [B, Q, 1, levels or 1, 1, 2 or 4]
    offsets = offsets.to(precise)
    if reference.shape[-1] == 2:
        cells = reference * valid + offsets
    else:
        cells = (reference[..., :2] + offsets * reference[..., 2:] * (0.5 / max(points, 1))) * valid
    sides = [(h, w) if h * w else (1, 1) for h, w in shapes]  # a level may have no cells
    x = torch.stack([cells[..., i, :, 0] / w for i, (_, w) in enumerate(sides)], dim=-2)
    y = torch.stack([cells[..., i, :, 1] / h for i, (h, _) in enumerate(sides)], dim=-2)
    weights = logits.to(precise).softmax(dim=-1).unflatten(-1, (levels, points))
    return ms_deform_attn_pytorch(value, shapes, torch.stack((x, y), dim=-1), weights)


def _check(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    valid_sizes: Tensor,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding: Tensor | None,
) -> None:
    if offsets.ndim != 6:
        raise ValueError(f"offsets must be [B, Q, H, levels, P, 2], got {list(offsets.shape)}")
    queries, points = offsets.shape[1], offsets.shape[4]
    check_value(value, shapes, queries, points)
    batch, tokens, heads, _ = value.shape
    levels = len(shapes)
    if levels == 0:
        raise ValueError("shapes must have at least one level, got none")
    if reference.ndim not in (3, 4) or reference.shape[-1] not in (2, 4):
        raise ValueError(
            "reference must be [B, Q, 2 or 4] or [B, Q, levels, 2 or 4], "
            f"got {list(reference.shape)}"
        )
    per_level = () if reference.ndim == 3 else (levels,)
    for name, tensor, shape in (
        ("offsets", offsets, (batch, queries, heads, levels, points, 2)),
        ("logits", logits, (batch, queries, heads, levels * points)),
        ("valid_sizes", valid_sizes, (batch, levels, 2)),
        ("reference", reference, (batch, queries, *per_level, reference.shape[-1])),
        ("padding", padding, (batch, tokens)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if padding is not None and padding.dtype != torch.bool:
        raise ValueError(f"padding must be {torch.bool}, got {padding.dtype}")


def _fake(
    value: Tensor,
    spatial_shapes: list[int],
    valid_sizes: Tensor,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    padding: Tensor | None,
) -> Tensor:
    sides = iter(spatial_shapes)
    shapes = list(zip(sides, sides, strict=True))
    _check(value, shapes, valid_sizes, reference, offsets, logits, padding)
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, offsets.shape[1], heads * channels)


def _fake_backward(
    _grad_output: Tensor,
    value: Tensor,
    _spatial_shapes: list[int],
    _valid_sizes: Tensor,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    _padding: Tensor | None,
    needs_reference: bool,
) -> tuple[Tensor, ...]:
    grad_value, grad_reference, grad_offsets, grad_logits = (
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (value, reference, offsets, logits)
    )
    if not needs_reference:
        grad_reference = reference.new_empty(0)
    return grad_value, grad_reference, grad_offsets, grad_logits


def _setup_context(
    ctx: Any,
    inputs: tuple[Any, ...],
    output: object,  # noqa: ARG001 - torch passes it by name
) -> None:
    value, spatial_shapes, *others = inputs
    ctx.save_for_backward(value, *others)
    ctx.spatial_shapes = spatial_shapes


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, *others = ctx.saved_tensors
    needs_reference = ctx.needs_input_grad[3]
    grad_value, grad_reference, grad_offsets, grad_logits = (
        torch.ops.dn_detr.deformable_attention_backward(
            grad_output, value, ctx.spatial_shapes, *others, needs_reference
        )
    )
    if not needs_reference:
        grad_reference = None
    return grad_value, None, None, grad_reference, grad_offsets, grad_logits, None


def _no_second_backward(_ctx: Any, *_grads: object) -> NoReturn:
    raise RuntimeError(
        "deformable_attention is not twice differentiable; use deformable_attention_pytorch instead"
    )


if KERNELS:
    torch.library.register_fake("dn_detr::deformable_attention", _fake)
    torch.library.register_fake("dn_detr::deformable_attention_backward", _fake_backward)
    torch.library.register_autograd(
        "dn_detr::deformable_attention", _backward, setup_context=_setup_context
    )
    torch.library.register_autograd("dn_detr::deformable_attention_backward", _no_second_backward)
