"""Bipartite matching (2005.12872, sec. 3.1): costs and assignments of a whole batch, one call each.

Compiled only; `losses.costs` and `losses.solve` are the plain twins, which use other rooms and SciPy.
All objects of a batch stand in one list of T, image after image; an object is only compared with
the slots of its own image.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    """Cost of every slot for every object of its image: [L, T, Q].

    logits [L, B, Q, K]; boxes [L, B, Q, 4] cxcywh; image_of [T] int64, ascending; labels [T] int64;
    object_boxes [T, 4]; all floats of one type, float32 or float64. Weighted sum of the L1 distance,
    minus the generalized IoU, and the class cost: focal (2010.04159, code), with p the object's class
    probability alpha (1 - p)^gamma (-log p) - (1 - alpha) p^gamma (-log(1 - p)), or minus the softmax
    probability. Not differentiable; no host synchronisation.
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
    """Solve the assignment problem of every layer, image and group of several segments.

    For each segment costs [L, T, slots], all float32 or all float64, is_empty [B, slots] bool or
    None, in how many equal groups its slots fall, and how often an object is placed in a group
    (2207.13080). image_of [T] int64, ascending.

    Returns for each segment object_of [L, B, slots] int64, the object of its image that a slot gets,
    -1 = none, at the least total cost; and is_bad [L, B] bool: a cost is NaN or infinite at a slot
    that is not empty, and the group that it belongs to got nothing. Objects take no empty slots; if
    there are more objects than slots, those stay without whose absence costs least in all. The
    result is the same on every device and with any number of threads. No host synchronisation.
    """
    return torch.ops.dn_detr.assign_objects(
        costs, image_of, batch, is_empty, num_groups, matches_per_object
    )


def has_nonfinite(values: Tensor, is_empty: Tensor | None) -> Tensor:
    """Where values [L, B, Q, C] hold NaN or infinity in a slot that is not empty: [L, B] bool.

    values float32 or float64; is_empty [B, Q] bool or None. No host synchronisation.
    """
    return torch.ops.dn_detr.has_nonfinite(values, is_empty)


def _fake_costs(logits: Tensor, _boxes: Tensor, image_of: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], image_of.shape[0], logits.shape[2])


def _fake_assign(
    costs: list[Tensor], image_of: Tensor, batch: int, *_: object
) -> tuple[list[Tensor], list[Tensor]]:
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
