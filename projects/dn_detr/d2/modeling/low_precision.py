"""Weights in the precision of autocast, made once per forward by few operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CAST = (nn.Linear, nn.Conv2d)
"""Modules whose weights and biases autocast casts at every use."""


def call_in_autocast(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module in training; results and gradients equal those of `module(*args, **kwargs)`.

    The weights of each child are cast together, so that their gradients are ready together: a child
    at a time, for DistributedDataParallel. Compiled modules cast for themselves.
    """
    device = next(module.parameters()).device.type
    is_cast = torch.is_autocast_enabled(device) and torch.is_grad_enabled() and module.training
    if not is_cast or getattr(module, "is_compiled", False):
        return module(*args, **kwargs)
    dtype = torch.get_autocast_dtype(device)
    casts: dict[str, Tensor] = {}
    # Shared weights are named, and cast, once.
    names = {id(value): name for name, value in module.named_parameters()}
    for child in module.children():
        weights = {
            names.pop(id(value)): value
            for part in child.modules()
            if isinstance(part, CAST)
            for value in part.parameters(recurse=False)
            if value.dtype == torch.float32 and id(value) in names
        }
        if weights:
            casts.update(zip(weights, _Cast.apply(dtype, *weights.values()), strict=True))
    # With tie_weights, torch 2.11 leaves the casts in modules that have two names.
    return torch.func.functional_call(module, casts, args, kwargs, tie_weights=False)


class _Cast(torch.autograd.Function):
    """Casts of float32 tensors to a dtype by one operator, and of their gradients back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        casts = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(casts, weights)
        return tuple(casts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        casts = [None if g is None else torch.empty_like(g, dtype=torch.float32) for g in gradients]
        torch._foreach_copy_(*([x for x in xs if x is not None] for xs in (casts, gradients)))
        return None, *casts
