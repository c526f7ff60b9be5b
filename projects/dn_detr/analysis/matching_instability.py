"""The instruments of DN-DETR (2203.01305): instability of matching, distance of anchors to targets.

Both are meant for a validation set: match the predictions of an unchanged, ordered set of queries
(`losses.assign`) after every epoch, and compare.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dn_detr.structures import Assignment, Targets


def last_matches(assignment: Assignment) -> Tensor:
    """Object of every slot after the last layer [B, N] int64; -1 = none, or no such slot."""
    return torch.where(assignment.is_real, assignment.object_of[-1], -1)


def changed_matches(previous: Tensor | Assignment, current: Tensor | Assignment) -> Tensor:
    """IS of each image: how many queries now have another object, or none: [B] int64.

    previous, current: of the same images and queries after two epochs, as assignments, whose last
    layer counts, or as object indices [B, N] (-1 = none). At most twice the number of objects.
    """
    previous, current = (
        last_matches(matches) if isinstance(matches, Assignment) else matches
        for matches in (previous, current)
    )
    if previous.shape != current.shape:
        raise ValueError(
            "matches must be of the same images and queries, got "
            f"{list(previous.shape)} and {list(current.shape)}"
        )
    return (previous != current).sum(-1)


def matching_instability(previous: Tensor | Assignment, current: Tensor | Assignment) -> Tensor:
    """IS: the mean of `changed_matches` over the images. A scalar in queries per image."""
    return changed_matches(previous, current).float().mean()


def anchor_target_distances(references: Tensor, targets: Targets, assignment: Assignment) -> Tensor:
    """L1 distance (sum over coordinates) of matched anchors to their objects, in no order: [n].

    references [B, N, R]: the initial ones, `predictions.references[0]` of the segment; boxes where
    R = 4, and where R = 2 points, which are compared with the objects' centres. Objects are those
    that the last layer matched.
    """
    width = references.shape[-1]
    if width not in (2, 4):
        raise ValueError(f"references must be [B, N, 2 or 4], got {list(references.shape)}")
    object_of = last_matches(assignment)
    if references.shape[:2] != object_of.shape:
        raise ValueError(
            f"references must be [{object_of.shape[0]}, {object_of.shape[1]}, 2 or 4] like the "
            f"assignment, got {list(references.shape)}"
        )
    index = object_of.clamp(min=0)[..., None].expand(-1, -1, width)
    wanted = targets.boxes[..., :width].gather(1, index)
    return (references - wanted).abs().sum(-1)[object_of >= 0]


def largest_distances(distances: Tensor, k: int = 100) -> Tensor:
    """ATD(k) of DINO (2203.03605): mean of the k largest distances [n] of a whole
    validation set, of all of them if there are fewer than k; NaN if there are none."""
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    return distances.topk(min(k, distances.shape[0])).values.mean()
