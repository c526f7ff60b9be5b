"""How parameters start where a module's own default is not what the papers use."""

from __future__ import annotations

from torch import nn


def xavier_(module: nn.Module) -> None:
    """Xavier-uniform for every matrix of `module`, as in the code of DETR (2005.12872)."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def xavier_fused_(linears: list[nn.Linear]) -> None:
    """Xavier-uniform as for one matrix that holds all of `linears` below each other, biases 0.

    That is how `nn.MultiheadAttention` starts its projections: with smaller values than each
    matrix alone would get.
    """
    total = sum(linear.out_features for linear in linears)
    for linear in linears:
        fan = linear.in_features + linear.out_features
        nn.init.xavier_uniform_(linear.weight, gain=(fan / (linear.in_features + total)) ** 0.5)
        nn.init.zeros_(linear.bias)
