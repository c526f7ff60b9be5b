"""Activation checkpointing: recompute the activations of layers in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from types import MethodType

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dn_detr.d2.modeling.meta_arch import core_of
from dn_detr.errors import InputError

PARTS = ("backbone", "encoder", "decoder")
CONTAINERS = (nn.Sequential, nn.ModuleList)


def recompute(model: nn.Module, parts: list[str]) -> None:
    """Checkpoint the activations of these parts, in place: layers keep only their inputs.

    Losses, gradients, random numbers, and parameters with their names do not change.

    Args:
        model: Model with a `backbone` and, for the other parts, a core.
        parts: Names from PARTS.

    Raises:
        InputError: If a part is unknown or has no blocks.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise InputError(
            f"MODEL.DN_DETR.RECOMPUTE must hold names of {', '.join(PARTS)}, got {sorted(unknown)}."
        )
    for name in parts:
        if name == "backbone":
            layers = list(blocks(model.backbone))
        else:
            layers = list(getattr(core_of(model, f"MODEL.DN_DETR.RECOMPUTE {name!r}"), name).layers)
        if not layers:
            raise InputError(
                f"MODEL.DN_DETR.RECOMPUTE: this {name} has no blocks that can be recomputed."
            )
        for layer in layers:
            # A bound method, so that a deep copy of the layer uses the weights of the copy.
            layer.forward = MethodType(_checkpointed_forward, layer)


def blocks(module: nn.Module, is_inside: bool = False) -> Iterator[nn.Module]:
    """Yield the blocks of a backbone: members of its outermost containers that have submodules."""
    for child in module.children():
        is_container = isinstance(child, CONTAINERS)
        if is_inside and not is_container:
            if any(True for _ in child.children()):
                yield child
        else:
            yield from blocks(child, is_container)


def _checkpointed_forward(layer: nn.Module, *inputs):
    """Run the forward of the layer's class, and in training keep only its inputs."""
    forward = partial(type(layer).forward, layer)  # torch.compile cannot trace a MethodType here
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*inputs)
    norms = [module for module in layer.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return checkpoint(forward, *inputs, use_reentrant=False)
    return checkpoint(
        forward,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _frozen_statistics(norms)),
    )


@contextlib.contextmanager
def _frozen_statistics(norms: list[_BatchNorm]) -> Iterator[None]:
    """Keep the running statistics of batch norms, which have already seen this batch."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
