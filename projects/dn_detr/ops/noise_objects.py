"""Denoising queries from noised ground truth (2203.01305, sec. 4; contrastive: 2203.03605)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dn_detr.ops.checks import check_images, check_product
from dn_detr.ops.extension import KERNELS, use_kernel
from dn_detr.ops.philox import BOX_DRAW, LABEL_DRAW, philox

# Random words: of BOX_DRAW, 0-3 move the four coordinates; of LABEL_DRAW, 0 decides whether the
# label is redrawn, 1 is the new class, the low 4 bits of 2 are the signs, 3 orders the objects.

# Memory-efficient attention requires mask rows that start at multiples of 16 elements.
MASK_PITCH = 16


class NoisedSlots(NamedTuple):
    """T denoising queries, group after group; a contrastive group is [positives | negatives].

    T = num_groups * slots_per_group, twice that if contrastive.

    Args:
        labels: [B, T] int64.
        boxes: [B, T, 4] cxcywh in [0, 1].
        assignment: [B, T] int64, the object of each query, -1 for negative and empty queries.
        is_empty: [B, T] bool, True without an object (label 0, box 0.5).
        mask: [B, 1, T + N, T + N], 0 where the query (row) may attend to the key (column), else
            -inf.
    """

    labels: Tensor
    boxes: Tensor
    assignment: Tensor
    is_empty: Tensor
    mask: Tensor


def noise_objects(
    labels: Tensor,
    boxes: Tensor,
    is_object: Tensor,
    noise_seeds: Tensor,
    *,
    num_groups: int,
    slots_per_group: int,
    num_classes: int,
    box_noise: float,
    label_noise: float,
    contrastive: bool,
    num_matched: int,
    mask_dtype: torch.dtype,
    hide_empty: bool = True,
) -> NoisedSlots:
    """Create noised copies of the objects per group, and the attention mask.

    The centre of a box moves by up to box_noise half sizes, and its size changes by a factor of up
    to 1 +- box_noise, uniformly. Contrastive: each side moves by box_noise * [0, 1) half sizes for
    positive, by box_noise * [1, 2) for negative queries, in either direction. Boxes are clamped to
    the image. If an image has more than slots_per_group objects, each group gets its own uniformly
    drawn subset.

    Denoising queries attend to their group and to the matched queries, which attend only to each
    other.

    The noise depends on the noise seed, object index and group alone, so it is equal on all
    devices and for any batch and M. Not differentiable; no host synchronisation.

    Args:
        labels: [B, M] int64.
        boxes: [B, M, 4] cxcywh in [0, 1], float32 or float64.
        is_object: [B, M] bool, objects first.
        noise_seeds: [B] int64.
        num_groups: Number of groups.
        slots_per_group: Most objects per group, at most M.
        num_classes: K.
        box_noise: Scale of the box noise.
        label_noise: Probability to replace a label by a uniformly drawn class.
        contrastive: Add negative queries (2203.03605, sec. 3.3).
        num_matched: N, number of matched queries, which follow the denoising queries.
        mask_dtype: Dtype of the mask.
        hide_empty: Mask out empty queries as keys of other queries; else their group attends to
            them (as published).

    Raises:
        ValueError: If shapes, dtypes or counts do not match.
    """
    arguments = (
        labels, boxes.detach() if boxes.requires_grad else boxes, is_object, noise_seeds,
        num_groups, slots_per_group, num_classes, float(box_noise), float(label_noise),
        contrastive, num_matched, mask_dtype, hide_empty,
    )  # fmt: skip
    if not use_kernel("noise_objects", labels.device):
        return noise_objects_pytorch(*arguments)
    return NoisedSlots(*torch.ops.dn_detr.noise_objects(*arguments))


@torch.no_grad()
def noise_objects_pytorch(
    labels: Tensor,
    boxes: Tensor,
    is_object: Tensor,
    noise_seeds: Tensor,
    num_groups: int,
    slots_per_group: int,
    num_classes: int,
    box_noise: float,
    label_noise: float,
    contrastive: bool,
    num_matched: int,
    mask_dtype: torch.dtype,
    hide_empty: bool = True,
) -> NoisedSlots:
    """Reference implementation of `noise_objects`, for labels [B, M]; bit-equal to the kernels."""
    kinds = 2 if contrastive else 1  # positives, negatives
    _check(
        labels, boxes, is_object, noise_seeds, num_groups, slots_per_group, num_classes, box_noise,
        label_noise, kinds, num_matched, mask_dtype,
    )  # fmt: skip
    batch = labels.shape[0]
    key = noise_seeds.view(batch, 1, 1, 1)
    group = torch.arange(num_groups, device=labels.device).view(1, num_groups, 1, 1)
    kind = torch.arange(kinds, device=labels.device).view(1, 1, kinds, 1)
    stream = group * 2 + kind
    index = _object_indices(is_object, key, group, slots_per_group)  # [B, G, 1, slots]
    index = index.expand(batch, num_groups, kinds, slots_per_group)

    words = philox(key, (index, stream, BOX_DRAW, 0))
    uniform = torch.stack([(word >> 8).to(boxes.dtype) * 2.0**-24 for word in words], dim=-1)
    flip, new_label, sign, _ = philox(key, (index, stream, LABEL_DRAW, 0))

    flat = index.flatten(1)
    is_empty = ~is_object.gather(1, flat)
    old_labels = labels.gather(1, flat)
    is_flipped = (flip >> 8).double() * 2.0**-24 < label_noise
    noised_labels = torch.where(is_flipped, (new_label * num_classes) >> 32, 0).flatten(1)
    noised_labels = torch.where(is_flipped.flatten(1), noised_labels, old_labels)
    noised_labels = torch.where(is_empty, 0, noised_labels)

    old_boxes = boxes.gather(1, flat[..., None].expand(*flat.shape, 4))
    uniform = uniform.flatten(1, 3)
    if contrastive:
        is_positive = ((kind & 0) + kind == 0).expand(index.shape).flatten(1)
        bits = torch.stack([(sign >> i) & 1 for i in range(4)], dim=-1).flatten(1, 3)
        reach = torch.where(is_positive[..., None], uniform, uniform + 1)
        noised_boxes = _move_sides(old_boxes, torch.where(bits == 1, -reach, reach) * box_noise)
        assigned = torch.where(is_positive & ~is_empty, flat, -1)
    else:
        noised_boxes = _move_box(old_boxes, (uniform * 2 - 1) * box_noise)
        assigned = torch.where(is_empty, -1, flat)
    noised_boxes = torch.where(is_empty[..., None], 0.5, noised_boxes)
    mask = _mask(is_empty, kinds * slots_per_group, num_matched, mask_dtype, hide_empty)
    return NoisedSlots(noised_labels, noised_boxes, assigned, is_empty, mask)


def _object_indices(is_object: Tensor, key: Tensor, group: Tensor, slots: int) -> Tensor:
    """Object index of each query, [B, G, 1, slots]; a random subset if not all objects fit."""
    batch, max_objects = is_object.shape
    order = torch.arange(max_objects, device=is_object.device).view(1, 1, 1, max_objects)
    if slots == max_objects:
        return order.expand(batch, group.shape[1], 1, max_objects)
    draw = philox(key, (order, group * 2, LABEL_DRAW, 0))[3]  # [B, G, 1, M]
    draw = torch.where(is_object[:, None, None], draw, 2**32)
    fits = (is_object.sum(dim=1) <= slots).view(batch, 1, 1, 1)
    return torch.where(fits, order, draw).argsort(dim=-1, stable=True)[..., :slots]


def _move_box(boxes: Tensor, scaled: Tensor) -> Tensor:
    """Move centres and sizes of boxes [B, T, 4] by scaled [B, T, 4] in [-box_noise, box_noise)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    centre = centre + scaled[..., :2] * (size * 0.5)
    size = size * (scaled[..., 2:] + 1)
    return torch.cat((centre, size), dim=-1).clamp(0, 1)


def _move_sides(boxes: Tensor, scaled: Tensor) -> Tensor:
    """Move x0, y0, x1, y1 of boxes [B, T, 4] by scaled [B, T, 4] half sizes."""
    centre, half = boxes[..., :2], boxes[..., 2:] * 0.5
    low = (centre - half + scaled[..., :2] * half).clamp(0, 1)
    high = (centre + half + scaled[..., 2:] * half).clamp(0, 1)
    return torch.cat(((low + high) * 0.5, (high - low).clamp(min=0)), dim=-1)


def _mask(
    is_empty: Tensor, group_size: int, num_matched: int, dtype: torch.dtype, hide_empty: bool
) -> Tensor:
    """Additive mask [B, 1, T + N, T + N] whose rows start at multiples of `MASK_PITCH` elements."""
    batch, slots = is_empty.shape
    total = slots + num_matched
    query = torch.arange(total, device=is_empty.device)
    is_matched = query >= slots
    group = torch.where(is_matched, -1, query // max(group_size, 1))
    allowed = (is_matched | (group == group[:, None])).expand(batch, total, total)
    if hide_empty:
        hidden = torch.nn.functional.pad(is_empty, (0, num_matched))[:, None]  # [B, 1, T + N]
        allowed = (allowed & ~hidden) | (query == query[:, None])
    pitch = -(-total // MASK_PITCH) * MASK_PITCH
    mask = torch.full((batch, 1, total, pitch), -torch.inf, dtype=dtype, device=is_empty.device)
    mask[..., :total].masked_fill_(allowed[:, None], 0)
    return mask[..., :total]


def _check(
    labels: Tensor,
    boxes: Tensor,
    is_object: Tensor,
    noise_seeds: Tensor,
    num_groups: int,
    slots_per_group: int,
    num_classes: int,
    box_noise: float,
    label_noise: float,
    kinds: int,
    num_matched: int,
    mask_dtype: torch.dtype,
) -> None:
    if labels.ndim != 2:
        raise ValueError(f"labels must be [B, M], got {list(labels.shape)}")
    batch, max_objects = labels.shape
    for name, tensor, shape in (
        ("boxes", boxes, (batch, max_objects, 4)),
        ("is_object", is_object, (batch, max_objects)),
        ("noise_seeds", noise_seeds, (batch,)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    for name, tensor, dtypes in (
        ("labels", labels, (torch.int64,)),
        ("boxes", boxes, (torch.float32, torch.float64)),
        ("is_object", is_object, (torch.bool,)),
        ("noise_seeds", noise_seeds, (torch.int64,)),
    ):
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    check_images(batch)
    if not 0 <= slots_per_group <= max_objects:
        raise ValueError(f"expected slots_per_group in [0, {max_objects}], got {slots_per_group}")
    check_product("num_groups * M", (num_groups, max_objects), 38)
    check_product("num_groups * slots_per_group", (num_groups, kinds, slots_per_group), 30)
    check_product("num_matched", (num_matched,), 30)
    check_product("num_classes", (num_classes,), 31)
    if num_classes == 0:
        raise ValueError("num_classes must be > 0, got 0")
    if not (math.isfinite(box_noise) and math.isfinite(label_noise)):
        raise ValueError(
            f"box_noise and label_noise must be finite, got {box_noise} and {label_noise}"
        )
    if not mask_dtype.is_floating_point:
        raise ValueError(f"mask_dtype must be a floating point type, got {mask_dtype}")


def _fake(
    labels: Tensor,
    boxes: Tensor,
    is_object: Tensor,
    noise_seeds: Tensor,
    num_groups: int,
    slots_per_group: int,
    num_classes: int,
    box_noise: float,
    label_noise: float,
    contrastive: bool,
    num_matched: int,
    mask_dtype: torch.dtype,
    _hide_empty: bool,
) -> tuple[Tensor, ...]:
    kinds = 2 if contrastive else 1
    _check(
        labels, boxes, is_object, noise_seeds, num_groups, slots_per_group, num_classes, box_noise,
        label_noise, kinds, num_matched, mask_dtype,
    )  # fmt: skip
    batch = labels.shape[0]
    slots = num_groups * slots_per_group * kinds
    total = slots + num_matched
    pitch = (total + MASK_PITCH - 1) // MASK_PITCH * MASK_PITCH
    return (
        labels.new_empty(batch, slots),
        boxes.new_empty(batch, slots, 4),
        labels.new_empty(batch, slots),
        is_object.new_empty(batch, slots),
        boxes.new_empty(batch, 1, total, pitch, dtype=mask_dtype)[..., :total],
    )


if KERNELS:
    torch.library.register_fake("dn_detr::noise_objects", _fake)
