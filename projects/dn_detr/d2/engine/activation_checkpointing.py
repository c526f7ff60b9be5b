"""Activation checkpointing: layers whose activations are computed again in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dn_detr.d2.modeling.meta_arch import core_of
from dn_detr.errors import InputError

PARTS = ("backbone", "encoder", "decoder")
CONTAINERS = (nn.Sequential, nn.ModuleList)


def recompute(model: nn.Module, parts: list[str]) -> None:
    """Let the layers of these parts keep only their inputs for the backward pass, in place.

    model: has a `backbone`, and for the other parts a core. Losses, gradients, random numbers,
    parameters and their names stay what they are.
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
                f"MODEL.DN_DETR.RECOMPUTE: this {name} has no blocks that could be computed again."
            )
        for layer in layers:
            layer.__class__ = _recomputed(type(layer))


def blocks(module: nn.Module, is_inside: bool = False) -> Iterator[nn.Module]:
    """The blocks of a backbone: what stands in its outermost sequences and consists of modules."""
    for child in module.children():
        is_container = isinstance(child, CONTAINERS)
        if is_inside and not is_container:
            if any(True for _ in child.children()):
                yield child
        else:
            yield from blocks(child, is_container)


@cache
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with a forward that keeps its inputs alone. A class, so that copies of a layer have it
    too, with their own weights."""

    def forward(self, *inputs):
        plain = super(recomputed, self).forward
        if not (self.training and torch.is_grad_enabled()):
            return plain(*inputs)
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm)]
        if not norms:
            return checkpoint(plain, *inputs, use_reentrant=False)
        return checkpoint(
            plain,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _without_statistics(norms)),
        )

    recomputed = type(kind.__name__, (kind,), {"forward": forward})
    return recomputed


@contextlib.contextmanager
def _without_statistics(norms: list[_BatchNorm]) -> Iterator[None]:
    """Inside, batch norms do not count the batch once more in their running statistics."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
