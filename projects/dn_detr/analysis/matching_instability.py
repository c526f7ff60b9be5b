"""Diagnostics of DN-DETR (2203.01305): matching instability and anchor-target distance.

Both are meant for a validation set: match the predictions of a fixed, ordered set of queries
(`losses.matcher.assign`) after every epoch, and compare.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dn_detr.structures import Assignment, Targets


def last_matches(assignment: Assignment) -> Tensor:
    """Return the object of every query in the last layer, [B, Q] int64; -1 for none or empty."""
    return torch.where(assignment.is_real, assignment.object_of[-1], -1)


def changed_matches(previous: Tensor | Assignment, current: Tensor | Assignment) -> Tensor:
    """Count the queries whose matched object changed, the instability score (IS) of each image.

    Args:
        previous, current: matches of the same images and queries after two epochs, as assignments
            (the last layer is used) or as object indices [B, Q] (-1 for none).

    Returns:
        [B] int64, at most twice the number of objects.
    """
    previous, current = (
        last_matches(matches) if isinstance(matches, Assignment) else matches
        for matches in (previous, current)
    )
    if previous.shape != current.shape:
        raise ValueError(
            "matches must belong to the same images and queries, got "
            f"{list(previous.shape)} and {list(current.shape)}"
        )
    return (previous != current).sum(-1)


def matching_instability(previous: Tensor | Assignment, current: Tensor | Assignment) -> Tensor:
    """Average `changed_matches` over images: scalar [], in queries per image."""
    return changed_matches(previous, current).float().mean()


def anchor_target_distances(references: Tensor, targets: Targets, assignment: Assignment) -> Tensor:
    """Compute the L1 distances of matched anchors to their objects in the last layer.

    Args:
        references: [B, Q, R], the initial ones (`predictions.references[0]` of the segment): boxes
            (R = 4), or points (R = 2) to compare with object centres.

    Returns:
        [n], summed over coordinates, in no particular order.
    """
    width = references.shape[-1]
    if width not in (2, 4):
        raise ValueError(f"references must be [B, Q, 2 or 4], got {list(references.shape)}")
    object_of = last_matches(assignment)
    if references.shape[:2] != object_of.shape:
        raise ValueError(
            f"references must be [{object_of.shape[0]}, {object_of.shape[1]}, 2 or 4] like the "
            f"assignment, got {list(references.shape)}"
        )
    index = object_of.clamp(min=0)[..., None].expand(-1, -1, width)
    expected = targets.boxes[..., :width].gather(1, index)
    return (references - expected).abs().sum(-1)[object_of >= 0]


def largest_distances(distances: Tensor, k: int = 100) -> Tensor:
    """Average the k largest distances [n] of a validation set: ATD(k) of DINO (2203.03605).

    Averages all if there are fewer than k; NaN if there are none.
    """
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    return distances.topk(min(k, distances.shape[0])).values.mean()
