"""Checks of sizes for reference implementations and fake kernels, as csrc/checks.h has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

MOST_IMAGES = 65535  # and layers: CUDA has a block of threads for each


def check_product(name: str, sizes: Sequence[int], bits: int) -> None:
    """Check that a product of sizes is below 2^bits, zeros counted as one.

    Symbolic sizes are left to the kernel: a comparison would limit the shapes of a compiled graph.

    Raises:
        ValueError: If it is not, or if a size is negative.
    """
    if torch.compiler.is_dynamo_compiling() or not all(isinstance(size, int) for size in sizes):
        return
    if min(sizes) < 0 or math.prod(max(size, 1) for size in sizes) >> bits:
        raise ValueError(f"expected {name} in [0, 2^{bits}), got {list(sizes)}")


def check_images(batch: int) -> None:
    """Check the number of images, which may be symbolic.

    Raises:
        ValueError: If it is negative or above `MOST_IMAGES`.
    """
    if isinstance(batch, int) and not 0 <= batch <= MOST_IMAGES:
        raise ValueError(f"expected at most {MOST_IMAGES} images, got {batch}")
