"""Parameter initialization of the published models.

In the authors' code, layers are copies of one layer whose matrices are then drawn anew. Here, each
layer also draws its own biases, from the same distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def copies(make: Callable[[], M], count: int) -> list[M]:
    """Make `count` modules that start from equal values."""
    modules = [make() for _ in range(count)]
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())
    return modules


def xavier_(module: nn.Module) -> None:
    """Initialize every matrix of `module` Xavier-uniformly (code of DETR, 2005.12872)."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def default_(module: nn.Module) -> None:
    """Initialize every layer of `module` as PyTorch does: uniform in +-1 / sqrt(inputs)."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.reset_parameters()


def xavier_fused_(linears: list[nn.Linear]) -> None:
    """Initialize `linears` Xavier-uniformly as one stacked matrix, biases to 0.

    This matches the fused projection of `nn.MultiheadAttention`; separate initialization would give
    larger values.
    """
    total = sum(linear.out_features for linear in linears)
    for linear in linears:
        fan = linear.in_features + linear.out_features
        nn.init.xavier_uniform_(linear.weight, gain=(fan / (linear.in_features + total)) ** 0.5)
        nn.init.zeros_(linear.bias)
