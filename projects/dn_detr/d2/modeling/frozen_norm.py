"""Frozen batch norms in training: scale and shift of all at once, applied by one operator each."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from dn_detr.layers.query_attention import attention_dtype


def join_frozen_norms(backbone: nn.Module) -> None:
    """Let the frozen batch norms of `backbone` share the computation of scale and shift, in place.

    Detectron2's recompute both in every norm and apply them one after the other. Neither names nor
    inference change.
    """
    for norm in _norms(backbone):
        norm.forward = MethodType(_forward, norm)
    if _norms(backbone):
        backbone.register_forward_pre_hook(_prepare)


def _norms(backbone: nn.Module) -> list[FrozenBatchNorm2d]:
    return [norm for norm in backbone.modules() if type(norm) is FrozenBatchNorm2d]


def _prepare(backbone: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Compute `scale_and_shift`, [1, C, 1, 1] each, of all norms with a gradient."""
    if not (backbone.training and torch.is_grad_enabled()):
        return
    norms = _norms(backbone)
    scales = torch._foreach_add([norm.running_var for norm in norms], [norm.eps for norm in norms])
    torch._foreach_rsqrt_(scales)
    torch._foreach_mul_(scales, [norm.weight for norm in norms])
    shifts = torch._foreach_mul([norm.running_mean for norm in norms], scales)
    shifts = torch._foreach_sub([norm.bias for norm in norms], shifts)
    widths, dtype = [norm.num_features for norm in norms], attention_dtype(inputs[0])
    scales, shifts = (torch.cat(values).to(dtype).split(widths) for values in (scales, shifts))
    for norm, scale, shift in zip(norms, scales, shifts, strict=True):
        norm.scale_and_shift = scale[None, :, None, None], shift[None, :, None, None]


def _forward(norm: FrozenBatchNorm2d, x: Tensor) -> Tensor:
    """Normalize x [B, C, h, w]."""
    if not (norm.training and x.requires_grad) or not hasattr(norm, "scale_and_shift"):
        return FrozenBatchNorm2d.forward(norm, x)
    scale, shift = norm.scale_and_shift
    return _ScaleAndShift.apply(x, scale.to(x.dtype), shift.to(x.dtype))


class _ScaleAndShift(torch.autograd.Function):
    """x [B, C, h, w] * scale + shift, with one operator backward; x alone gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return torch.addcmul(shift, x, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None
