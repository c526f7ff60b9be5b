"""Tensors that depend on nothing but numbers, made once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


def made_once(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep the last results [...] of `make`, a function of hashable arguments, device included.

    The results must not be changed. Compiled and exported graphs make their own.
    """
    kept: dict[tuple[Hashable, ...], Tensor] = {}  # the last 64

    @functools.wraps(make)
    def get(*key: Hashable) -> Tensor:
        if torch.compiler.is_compiling():
            return make(*key)
        if key not in kept:
            with torch.inference_mode(False):
                made = make(*key)
            if type(made) is not Tensor:  # of a tracer
                return made
            if len(kept) == 64:
                kept.pop(next(iter(kept)))
            kept[key] = made
        return kept[key]

    return get


@made_once
def constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a tensor [...] of nested tuples of numbers; a copy each time would wait for a GPU."""
    return torch.tensor(values, dtype=dtype, device=device)
