"""Parameter initialization of the published models."""

from __future__ import annotations

from torch import nn


def xavier_(module: nn.Module) -> None:
    """Initialize every matrix of `module` Xavier-uniformly (code of DETR, 2005.12872)."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


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
