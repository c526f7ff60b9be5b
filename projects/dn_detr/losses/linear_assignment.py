"""Linear assignment: objects of an image to queries of a group at minimal total cost."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dn_detr.ops.extension import use_kernel
from dn_detr.ops.matching import assign_objects, check_counts


def solve(
    costs: list[Tensor],
    image_of: Tensor,
    batch: int,
    is_empty: list[Tensor | None],
    num_groups: list[int],
    matches_per_object: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """Solve the assignment of several segments, by the kernel or by SciPy (one copy to the host).

    Args:
        costs: of each segment, [L, T, Q] for the T objects of the batch.
        image_of: [T] int64, ascending.
        batch: number of images B.
        is_empty: of each segment, [B, Q] bool or None.
        num_groups: of each segment.
        matches_per_object: of each segment.

    Returns:
        For each segment: the object of each query [L, B, Q] int64, -1 for none; whether a cost is
        not finite [L, B] bool. See `ops.matching.assign_objects`.
    """
    if use_kernel("assign_objects", image_of.device):
        return assign_objects(costs, image_of, batch, is_empty, num_groups, matches_per_object)
    return solve_pytorch(costs, image_of, batch, is_empty, num_groups, matches_per_object)


def solve_pytorch(
    costs: list[Tensor],
    image_of: Tensor,
    batch: int,
    is_empty: list[Tensor | None],
    num_groups: list[int],
    matches_per_object: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """Reference implementation of `solve` by SciPy, with the same shapes ([L, T, Q] costs, ...)."""
    check_counts(costs, batch, num_groups, matches_per_object)
    if not costs:
        return [], []
    is_empty = [
        cost.new_zeros(batch, cost.shape[2]) if empty is None else empty.to(cost.dtype)
        for cost, empty in zip(costs, is_empty, strict=True)
    ]
    # Image indices are exact in float32: they are far below 2^24.
    arrays = _to_host([image_of.to(costs[0].dtype), *costs, *is_empty])
    starts = np.searchsorted(arrays[0], np.arange(batch + 1))
    found = [
        _solve_segment(*arguments, starts)
        for arguments in zip(
            arrays[1 : 1 + len(costs)],
            arrays[1 + len(costs) :],
            num_groups,
            matches_per_object,
            strict=True,
        )
    ]
    object_of, is_bad = zip(*found, strict=True)
    return _to_device(object_of, image_of.device), _to_device(is_bad, image_of.device)


def _solve_segment(
    cost: np.ndarray,
    is_empty: np.ndarray,
    num_groups: int,
    matches_per_object: int,
    starts: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """object_of [L, B, Q] and is_bad [L, B] for cost [L, T, Q] and is_empty [B, Q]."""
    layers, _, queries = cost.shape
    batch = starts.size - 1
    object_of = np.full((layers, batch, queries), -1, dtype=np.int64)
    is_bad = np.zeros((layers, batch), dtype=bool)
    for layer, image, group in np.ndindex(layers, batch, num_groups):
        first, end = starts[image], starts[image + 1]
        width = queries // num_groups
        real = group * width + np.flatnonzero(is_empty[image, group * width :][:width] == 0)
        matrix = cost[layer, first:end][:, real]
        if not np.isfinite(matrix).all():
            is_bad[layer, image] = True
        elif end > first:
            copies = min(matches_per_object, width)  # more have no effect
            rows, columns = linear_sum_assignment(np.tile(matrix, (copies, 1)))
            object_of[layer, image, real[columns]] = rows % (end - first)
    return object_of, is_bad


def _to_host(tensors: list[Tensor]) -> list[np.ndarray]:
    """Copy tensors of one dtype to the host at once."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu().numpy()
    pieces = np.split(flat, np.cumsum([tensor.numel() for tensor in tensors])[:-1])
    return [piece.reshape(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def _to_device(arrays: tuple[np.ndarray, ...], device: torch.device) -> list[Tensor]:
    """Copy arrays of one dtype to the device at once."""
    joined = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    parts = joined.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
