"""Philox4x32-10, a counter-based random generator (Salmon et al., SC 2011), in int64 arithmetic.

The kernels use csrc/philox.h.
"""

from __future__ import annotations

from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, as 32-bit fractions
MASK = 0xFFFFFFFF

# Third word of the counter: what the random words of an image are for, each in one place. The
# kernels have the first two (csrc/noise_objects.h).
BOX_DRAW, LABEL_DRAW, POINT_DRAW, PROMPT_DRAW = range(4)


def philox(key: Tensor, counter: tuple[Tensor | int, ...]) -> tuple[Tensor, ...]:
    """Generate four random words.

    Args:
        key: [...] int64; both halves are used.
        counter: Four words in [0, 2^32), integers or tensors broadcast against key.

    Returns:
        Four tensors [...] int64 in [0, 2^32).
    """
    zero = key & 0
    c0, c1, c2, c3 = (zero + word for word in counter)
    k0, k1 = key & MASK, (key >> 32) & MASK
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product, computed in 16-bit halves to avoid int64 overflow."""
    low = (word & 0xFFFF) * factor
    middle = (word >> 16) * factor + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
