"""Hungarian matching (2005.12872, sec. 3.1) of all layers and segments at once.

With the compiled operators nothing synchronises with the GPU: costs, assignments and flags for
non-finite values stay on the device. Without them, costs are copied to the host once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from dn_detr.losses.linear_assignment import solve
from dn_detr.losses.matching_costs import Costs, MatchingCosts, Objects, list_objects
from dn_detr.losses.segments import split_segments
from dn_detr.ops.extension import use_kernel
from dn_detr.ops.matching import has_nonfinite
from dn_detr.structures import Assignment, Assignments, Predictions, Targets

__all__ = ["Costs", "assign", "find_nonfinite"]


@torch.no_grad()
def assign(
    predictions: Predictions,
    targets: Targets,
    costs: MatchingCosts,
    only: Collection[str] | None = None,
    *,
    raises: bool = True,
) -> Assignments:
    """Assign the objects of each image to queries, separately for every layer and segment.

    Segments with a fixed assignment keep it. In the others, each group of queries matches each
    object at most `matches_per_object` times at minimal total cost; empty queries are not matched,
    and surplus objects stay unmatched.

    Args:
        costs: (predictions of one segment, objects) -> costs [L, T, Q], such as `Costs`.
        only: names of the segments to match, None for all.
        raises: whether non-finite numbers are an error at once where that needs no synchronization.

    Returns:
        Assignments by segment name, "encoder/<name>" for proposals. `Assignment.is_bad` marks
        non-finite logits, boxes or costs; `Criterion` turns their losses into NaN, and
        `find_nonfinite` describes them.

    Raises:
        FloatingPointError: on the CPU, if logits, boxes or costs are not finite and `raises`.
    """
    objects = list_objects(targets)
    parts = split_segments(predictions, only)
    matched = {name: part for name, part in parts.items() if part.segments[0].assignment is None}
    segments = [part.segments[0] for part in matched.values()]
    object_of, has_bad_cost = solve(
        [_costs(part, objects, costs) for part in matched.values()],
        objects.image_of,
        targets.labels.shape[0],
        [segment.is_empty for segment in segments],
        [segment.num_groups for segment in segments],
        [segment.matches_per_object for segment in segments],
    )
    found = dict(zip(matched, zip(object_of, has_bad_cost, strict=True), strict=True))
    assignments = {}
    for name, part in parts.items():
        if name in found:
            matches, is_bad = found[name]
            matches = _remove_ignored(matches, part.segments[0].ignored_objects)
            assignment = Assignment(matches, _is_real(part), is_bad | _is_nonfinite(part))
        else:
            fixed = part.segments[0].assignment.expand(part.logits.shape[0], -1, -1)
            assignment = Assignment(fixed, _is_real(part))
        assignments[name] = assignment
    is_checked = raises and predictions.logits.device.type == "cpu"
    if is_checked and (message := find_nonfinite(assignments)):
        raise FloatingPointError(message)
    return assignments


def find_nonfinite(assignments: Assignments) -> str:
    """Describe the first segment, layer and image with `is_bad` set, or return "".

    Synchronises with the device.
    """
    for name, assignment in assignments.items():
        places = [] if assignment.is_bad is None else assignment.is_bad.nonzero().tolist()
        if places:
            layer, image = places[0]
            return (
                f"NaN or infinity in the logits, boxes or matching costs of segment {name!r}, "
                f"layer {layer}, image {image} of the batch ({len(places)} such places in total)"
            )
    return ""


def _remove_ignored(object_of: Tensor, ignored_objects: Tensor | None) -> Tensor:
    """Replace ignored objects ([B, M] bool or None) in object_of [L, B, Q] by -1."""
    if ignored_objects is None:
        return object_of
    ignored_objects = ignored_objects.expand(object_of.shape[0], -1, -1)
    return torch.where(ignored_objects.gather(2, object_of.clamp(min=0)), -1, object_of)


def _costs(part: Predictions, objects: Objects, costs: MatchingCosts) -> Tensor:
    """Costs [L, T, Q] of a single segment."""
    if part.is_class_agnostic:
        objects = replace(objects, labels=torch.zeros_like(objects.labels))
    return costs(part, objects)


def _is_real(part: Predictions) -> Tensor:
    """[B, Q] bool: the non-empty queries of a single segment."""
    is_empty = part.segments[0].is_empty
    if is_empty is None:
        return torch.ones(part.logits.shape[1:3], dtype=torch.bool, device=part.logits.device)
    return ~is_empty


def _is_nonfinite(part: Predictions) -> Tensor:
    """[L, B] bool: whether logits or boxes of non-empty queries contain NaN or infinity."""
    is_bad = torch.zeros(part.logits.shape[:2], dtype=torch.bool, device=part.logits.device)
    for values in (part.logits, part.boxes) if part.boxes is not None else (part.logits,):
        if use_kernel("has_nonfinite", values.device):
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            is_bad |= has_nonfinite(values, part.segments[0].is_empty)
        else:
            is_bad |= (_is_real(part) & ~values.isfinite().all(-1)).any(-1)
    return is_bad
