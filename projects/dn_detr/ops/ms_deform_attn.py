"""Multi-scale deformable attention from sampling locations and weights (2010.04159, sec. 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from dn_detr.ops.checks import check_product
from dn_detr.ops.extension import KERNELS, use_kernel


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sum bilinear samples of all levels and points with the attention weights.

    Sampling is that of `grid_sample(align_corners=False, padding_mode="zeros")`; locations outside,
    infinite or NaN contribute nothing and get no gradient. Accumulates in float32. Gradients have
    the dtype of their inputs. Not twice differentiable. The backward is deterministic on the CPU,
    and on CUDA under `torch.use_deterministic_algorithms(True)`.

    Args:
        value: [B, S, H, D] float32, float16, bfloat16 or float64; levels fine to coarse.
        spatial_shapes: (h, w) of each level as host integers, sum of h * w = S.
        sampling_locations: [B, Q, H, levels, P, 2], (x, y) in [0, 1] of a level; float32 (float64
            for float64 values), because bfloat16 is off by up to half a cell.
        attention_weights: [B, Q, H, levels, P], in the dtype of the locations.

    Returns:
        [B, Q, H * D] in the dtype of value.

    Raises:
        ValueError: If shapes or dtypes do not match.
    """
    if use_kernel("ms_deform_attn", value.device):
        sides = [side for shape in spatial_shapes for side in shape]
        return torch.ops.dn_detr.ms_deform_attn(value, sides, sampling_locations, attention_weights)
    return ms_deform_attn_pytorch(value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_pytorch(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Reference implementation of `ms_deform_attn`, also for ONNX export: [B, Q, H * D]."""
    _check(value, spatial_shapes, sampling_locations, attention_weights)
    batch, _, heads, channels = value.shape
    cells = value.to(sampling_locations.dtype)
    output = cells.new_zeros(batch * heads, channels, sampling_locations.shape[1])
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        if height * width == 0:
            continue
        image = cells[:, start : start + height * width].permute(0, 2, 3, 1)
        image = image.reshape(batch * heads, channels, height, width)
        start = start + height * width
        location = (
            sampling_locations[:, :, :, level].transpose(1, 2).flatten(0, 1)
        )  # [B*H, Q, P, 2]
        weight = attention_weights[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B*H, Q, P]
        x = location[..., 0] * width - 0.5
        y = location[..., 1] * height - 0.5
        # Comparisons with NaN are false, so NaN locations are outside.
        is_inside = (x > -1) & (x < width) & (y > -1) & (y < height)
        # -3 is outside of every level; `where` blocks the gradients of replaced values.
        grid = torch.where(is_inside[..., None], 2 * location - 1, -3.0)
        weight = torch.where(is_inside, weight, 0.0)
        sampled = F.grid_sample(
            image, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )  # [B*H, D, Q, P]
        output = output + (sampled * weight[:, None]).sum(dim=-1)
    output = output.reshape(batch, heads * channels, output.shape[-1])
    return output.transpose(1, 2).contiguous().to(value.dtype)


def check_value(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], queries: int, points: int
) -> None:
    """Check a value [B, S, H, D], its levels, and the sizes that a kernel multiplies.

    Raises:
        ValueError: If they do not fit, or are too large for a kernel.
    """
    if value.ndim != 4:
        raise ValueError(f"value must be [B, S, H, D], got {list(value.shape)}")
    if value.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(f"value must be float32, float16, bfloat16 or float64, got {value.dtype}")
    batch, tokens, heads, channels = value.shape
    check_product("S * H * D", (tokens, heads, channels), 31)
    check_product("B", (batch,), 24)
    check_product("Q * H", (queries, heads), 26)
    check_product("levels * P * P", (len(spatial_shapes), points, points), 31)
    for shape in spatial_shapes:
        check_product("h * w of spatial_shapes", shape, 31)
    cells = sum(height * width for height, width in spatial_shapes)
    if cells != tokens:
        raise ValueError(f"spatial_shapes must hold S = {tokens} cells, got {cells}")


def _check(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> None:
    if sampling_locations.ndim != 6 or sampling_locations.shape[5] != 2:
        raise ValueError(
            "sampling_locations must be [B, Q, H, levels, P, 2], "
            f"got {list(sampling_locations.shape)}"
        )
    check_value(value, spatial_shapes, sampling_locations.shape[1], sampling_locations.shape[4])
    batch, _, heads, _ = value.shape
    levels = len(spatial_shapes)
    if sampling_locations.shape[0] != batch or sampling_locations.shape[2:4] != (heads, levels):
        raise ValueError(
            f"sampling_locations must be [{batch}, Q, {heads}, {levels}, P, 2], "
            f"got {list(sampling_locations.shape)}"
        )
    if attention_weights.shape != sampling_locations.shape[:5]:
        raise ValueError(
            f"attention_weights must be {list(sampling_locations.shape[:5])}, "
            f"got {list(attention_weights.shape)}"
        )
    precise = torch.float64 if value.dtype == torch.float64 else torch.float32
    for name, tensor in (
        ("sampling_locations", sampling_locations),
        ("attention_weights", attention_weights),
    ):
        if tensor.dtype != precise:
            raise ValueError(
                f"{name} must be {precise} with {value.dtype} values, got {tensor.dtype}"
            )


def _fake(
    value: Tensor, spatial_shapes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    sides = iter(spatial_shapes)
    _check(value, list(zip(sides, sides, strict=True)), sampling_locations, attention_weights)
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * channels)


def _fake_backward(
    _grad_output: Tensor,
    value: Tensor,
    _spatial_shapes: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, ...]:
    inputs = (value, sampling_locations, attention_weights)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def _setup_context(
    ctx: Any,
    inputs: tuple[Any, ...],
    output: object,  # noqa: ARG001 - torch passes it by name
) -> None:
    value, spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)
    ctx.spatial_shapes = spatial_shapes


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, sampling_locations, attention_weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = torch.ops.dn_detr.ms_deform_attn_backward(
        grad_output, value, ctx.spatial_shapes, sampling_locations, attention_weights
    )
    return grad_value, None, grad_locations, grad_weights


def _no_second_backward(_ctx: Any, *_grads: object) -> NoReturn:
    raise RuntimeError(
        "ms_deform_attn is not twice differentiable; use ms_deform_attn_pytorch instead"
    )


if KERNELS:
    torch.library.register_fake("dn_detr::ms_deform_attn", _fake)
    torch.library.register_fake("dn_detr::ms_deform_attn_backward", _fake_backward)
    torch.library.register_autograd(
        "dn_detr::ms_deform_attn", _backward, setup_context=_setup_context
    )
    torch.library.register_autograd("dn_detr::ms_deform_attn_backward", _no_second_backward)
