"""The assignment problem: objects of an image to slots of a group, at the least total cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment


def solve(
    cost: np.ndarray,
    counts: Sequence[int],
    *,
    num_slots: int,
    repeats: int = 1,
    candidates: np.ndarray | None = None,
) -> np.ndarray:
    """The object of each slot for every layer, image and group: [L, B, G, num_slots], -1 = none.

    cost [L, T, G, q]: object t (image after image, counts[b] of them) at each of q slots; infinite
    where forbidden, which must hold for all objects of the image or, with candidates, leave each
    object as many slots as the image has objects to place. candidates [L, T, G, q]: which slots
    these are; None: all, q = num_slots. repeats: how often each object is placed (2207.13080).
    If there are more objects than slots, those get none whose absence costs least in all.
    """
    layers, _, groups, _ = cost.shape
    object_of = np.full((layers, len(counts), groups, num_slots), -1, dtype=np.int64)
    first = 0
    for image, count in enumerate(counts):
        for layer in range(layers) if count else ():
            for group in range(groups):
                matrix = cost[layer, first : first + count, group]
                slots = np.arange(num_slots)
                if candidates is not None:
                    chosen = candidates[layer, first : first + count, group]
                    matrix, slots = _spread(matrix, chosen)
                allowed = np.isfinite(matrix).any(axis=0)
                rows, columns = linear_sum_assignment(np.tile(matrix[:, allowed], (repeats, 1)))
                object_of[layer, image, group, slots[allowed][columns]] = rows % count
        first += count
    return object_of


def _spread(cost: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Costs [n, q] of each object's own candidates [n, q] as a matrix [n, u] over their union."""
    slots, columns = np.unique(candidates, return_inverse=True)
    matrix = np.full((cost.shape[0], slots.size), np.inf, dtype=cost.dtype)
    np.put_along_axis(matrix, columns.reshape(cost.shape), cost, axis=1)
    return matrix, slots
