"""Who rebuilds what: bipartite matching (2005.12872, sec. 3.1) of all layers and segments at once.

The costs of all layers, segments, images and proposals travel to the host in one copy, so that a
step waits for the device once. `costs` computes them and `solve` answers them; operators with the
same signatures may replace both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dn_detr.losses.costs import Costs, Objects, list_objects
from dn_detr.losses.segments import split_segments
from dn_detr.losses.solve import solve
from dn_detr.structures import Assignment, Assignments, Predictions, Segment, Targets

__all__ = ["Costs", "assign"]

SLOTS_PER_CANDIDATE = 32
"""Objects bring only their cheapest slots to the host if that shrinks the copy so many times."""


@torch.no_grad()
def assign(
    predictions: Predictions,
    targets: Targets,
    costs: Callable[[Predictions, Objects], Tensor],
    only: Collection[str] | None = None,
) -> Assignments:
    """Assign the objects of each image to its slots, for every layer and segment on its own.

    Segments with a fixed assignment get that; in the others each group of slots takes each object
    at most `repeats` times at the least total cost. Empty slots are never matched; objects that
    find no slot stay without. Proposals are answered under "encoder/<name>". only: names of the
    segments wanted, None = all. FloatingPointError where logits, boxes or costs are not finite.
    """
    objects = list_objects(targets)
    parts = split_segments(predictions, only)
    is_real = {name: _is_real(part) for name, part in parts.items()}
    problems = {
        name: _pose(part, objects, is_real[name], costs, max(targets.counts))
        for name, part in parts.items()
        if part.segments[0].assignment is None
    }
    object_of = _solve_all(problems, targets.counts, predictions.logits.device)
    for name, part in parts.items():
        if name not in problems:
            layers = part.logits.shape[0]
            object_of[name] = part.segments[0].assignment.expand(layers, -1, -1)
    return {name: Assignment(object_of[name], is_real[name]) for name in parts}


def _is_real(part: Predictions) -> Tensor:
    """[B, size] bool: the slots of a single segment that exist."""
    is_empty = part.segments[0].is_empty
    if is_empty is None:
        return torch.ones(part.logits.shape[1:3], dtype=torch.bool, device=part.logits.device)
    return ~is_empty


@dataclass(frozen=True, eq=False)
class _Problem:
    """Costs of one segment on the device: is_bad [L, B], 0 where all is finite; cost [L, T, G, q],
    infinite at empty slots; candidates [L, T, G, q]: the slots of `cost` in their group, None: all.
    """

    segment: Segment
    is_bad: Tensor
    cost: Tensor
    candidates: Tensor | None

    def tensors(self) -> list[Tensor]:
        parts = [self.is_bad, self.cost]
        return parts if self.candidates is None else [*parts, self.candidates]


def _pose(
    part: Predictions, objects: Objects, is_real: Tensor, costs: Callable, most_objects: int
) -> _Problem:
    segment = part.segments[0]
    labels = torch.zeros_like(objects.labels) if part.is_class_agnostic else objects.labels
    cost = costs(part, replace(objects, labels=labels))  # [L, T, size]
    is_finite = part.logits.isfinite().all(-1)  # [L, B, size]
    if part.boxes is not None:
        is_finite &= part.boxes.isfinite().all(-1)
    is_bad = (is_real & ~is_finite).any(-1).to(cost.dtype)
    can_match = is_real[objects.image_of]  # [T, size]
    has_bad_cost = (can_match & ~cost.isfinite()).any(-1).to(cost.dtype)
    is_bad = is_bad.index_add(1, objects.image_of, has_bad_cost)
    cost = torch.where(can_match, cost, torch.inf)
    cost = cost.unflatten(-1, (segment.num_groups, segment.size // segment.num_groups))
    # Some best assignment uses only the n cheapest slots of each of n objects: of those, the other
    # objects occupy at most n - 1, so an object elsewhere could move in without paying more.
    enough = most_objects * segment.repeats
    candidates = None
    if 0 < enough * SLOTS_PER_CANDIDATE <= cost.shape[-1]:
        cost, candidates = cost.topk(enough, largest=False, sorted=False)
    return _Problem(segment, is_bad, cost, candidates)


def _solve_all(
    problems: dict[str, _Problem], counts: tuple[int, ...], device: torch.device
) -> dict[str, Tensor]:
    """object_of [L, B, size] of every problem: one copy to the host, one back."""
    if not problems:
        return {}
    # Slot numbers stay exact as float32: they are far below 2^24.
    tensors = [tensor for problem in problems.values() for tensor in problem.tensors()]
    flat = torch.cat([tensor.reshape(-1).to(tensors[0].dtype) for tensor in tensors]).cpu().numpy()
    pieces = np.split(flat, np.cumsum([tensor.numel() for tensor in tensors])[:-1])
    arrays = iter(
        piece.reshape(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)
    )
    solved = {}
    for name, problem in problems.items():
        _check_finite(name, next(arrays))
        cost = next(arrays)
        candidates = None if problem.candidates is None else next(arrays).astype(np.int64)
        segment = problem.segment
        object_of = solve(
            cost,
            counts,
            num_slots=segment.size // segment.num_groups,
            repeats=segment.repeats,
            candidates=candidates,
        )
        solved[name] = object_of.reshape(*object_of.shape[:2], segment.size)
    joined = torch.from_numpy(np.concatenate([array.reshape(-1) for array in solved.values()]))
    parts = joined.to(device, non_blocking=True).split([array.size for array in solved.values()])
    return {
        name: part.view(array.shape)
        for (name, array), part in zip(solved.items(), parts, strict=True)
    }


def _check_finite(name: str, is_bad: np.ndarray) -> None:
    places = np.argwhere(is_bad)
    if places.size:
        layer, image = places[0]
        raise FloatingPointError(
            f"NaN or infinity in the logits, boxes or matching costs of segment {name!r}, "
            f"layer {layer}, image {image} of the batch ({len(places)} such places in all)"
        )
