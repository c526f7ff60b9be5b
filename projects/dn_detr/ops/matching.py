"""Bipartite matching of a whole batch: costs and assignments (2005.12872, sec. 3.1).

Compiled only; `losses.matching_costs` and `losses.linear_assignment` are the reference
implementations. All objects of a batch are concatenated to T objects, image after image; each is
compared only with the queries of its image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dn_detr.ops.checks import check_images, check_product
from dn_detr.ops.extension import KERNELS


def matching_costs(
    logits: Tensor,
    boxes: Tensor,
    image_of: Tensor,
    labels: Tensor,
    object_boxes: Tensor,
    *,
    class_cost: float,
    l1: float,
    giou: float,
    is_softmax: bool,
    alpha: float,
    gamma: float,
) -> Tensor:
    """Compute the matching costs of all queries and objects.

    The cost is the weighted sum of the L1 distance, the negative generalized IoU and the class
    cost: the negative softmax probability, or the focal cost (2010.04159, code) for class
    probability p, alpha (1 - p)^gamma (-log p) - (1 - alpha) p^gamma (-log(1 - p)). All floats have
    one dtype, float32 or float64. Not differentiable; no host synchronisation.

    Args:
        logits: [L, B, Q, K].
        boxes: [L, B, Q, 4] cxcywh.
        image_of: [T] int64, ascending.
        labels: [T] int64.
        object_boxes: [T, 4] cxcywh.
        class_cost: Weight of the class cost.
        l1: Weight of the L1 distance.
        giou: Weight of the generalized IoU.
        is_softmax: Use the softmax class cost.
        alpha: Focal alpha.
        gamma: Focal gamma.

    Returns:
        [L, T, Q].
    """
    return torch.ops.dn_detr.matching_costs(
        logits, boxes, image_of, labels, object_boxes, float(class_cost), float(l1), float(giou),
        is_softmax, float(alpha), float(gamma),
    )  # fmt: skip


def assign_objects(
    costs: list[Tensor],
    image_of: Tensor,
    batch: int,
    is_empty: list[Tensor | None],
    num_groups: list[int],
    matches_per_object: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """Solve the assignment problems of all layers, images and groups of several segments.

    Each solution has the least total cost. Empty queries get no object; if there are more objects
    than queries, some objects stay unmatched. The result does not depend on the device or the
    number of threads. No host synchronisation.

    Args:
        costs: [L, T, Q] per segment, all float32 or all float64.
        image_of: [T] int64, ascending.
        batch: B.
        is_empty: [B, Q] bool or None, per segment.
        num_groups: Number of equal groups of queries, per segment.
        matches_per_object: How often an object is matched in a group (2207.13080), per segment.

    Returns:
        Per segment, object_of [L, B, Q] int64, the index of the matched object in its image or -1;
        and is_bad [L, B] bool, True if a group stays unmatched because a query that is not empty
        has a NaN or infinite cost.
    """
    return torch.ops.dn_detr.assign_objects(
        costs, image_of, batch, is_empty, num_groups, matches_per_object
    )


def check_counts(
    costs: list[Tensor], batch: int, num_groups: list[int], matches_per_object: list[int]
) -> None:
    """Check the counts of `assign_objects` with its costs [L, T, Q] of each segment.

    Raises:
        ValueError: If they do not fit, or are too large for a kernel.
    """
    check_images(batch)
    for cost, groups, matches in zip(costs, num_groups, matches_per_object, strict=True):
        layers, objects, queries = cost.shape
        if groups <= 0 or queries % groups or matches <= 0:
            raise ValueError(
                f"expected matches_per_object > 0 and num_groups to divide {queries} slots, got "
                f"{matches} and {groups}"
            )
        check_product("slots", (queries,), 30)
        check_product("L * B * num_groups", (layers, batch, groups), 31)
        check_product("T * matches_per_object", (objects, matches), 30)


def has_nonfinite(values: Tensor, is_empty: Tensor | None) -> Tensor:
    """Find NaN and infinity in values [L, B, Q, C] of queries that are not empty: [L, B] bool.

    values float32 or float64; is_empty [B, Q] bool or None. No host synchronisation.
    """
    return torch.ops.dn_detr.has_nonfinite(values, is_empty)


def _fake_costs(logits: Tensor, _boxes: Tensor, image_of: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], image_of.shape[0], logits.shape[2])


def _fake_assign(
    costs: list[Tensor],
    image_of: Tensor,
    batch: int,
    _is_empty: list[Tensor | None],
    num_groups: list[int],
    matches_per_object: list[int],
) -> tuple[list[Tensor], list[Tensor]]:
    check_counts(costs, batch, num_groups, matches_per_object)
    return (
        [image_of.new_empty(cost.shape[0], batch, cost.shape[2]) for cost in costs],
        [image_of.new_empty(cost.shape[0], batch, dtype=torch.bool) for cost in costs],
    )


def _fake_has_nonfinite(values: Tensor, _is_empty: Tensor | None) -> Tensor:
    return values.new_empty(values.shape[:2], dtype=torch.bool)


if KERNELS:
    torch.library.register_fake("dn_detr::matching_costs", _fake_costs)
    torch.library.register_fake("dn_detr::assign_objects", _fake_assign)
    torch.library.register_fake("dn_detr::has_nonfinite", _fake_has_nonfinite)
