"""MixUp: blend every image of a batch with the one before it (DEIM, 2412.04234)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor
from torch.nn import functional as F


def mix_batch(samples: list[dict], share: float, fill: Sequence[int]) -> list[dict]:
    """Mix each sample with the one before it, the first with the last; see `mix`."""
    return [mix(sample, samples[i - 1], share, fill) for i, sample in enumerate(samples)]


def mix(one: dict, other: dict, share: float, fill: Sequence[int]) -> dict:
    """Blend two samples to share * one + (1 - share) * other, with the objects of both, unweighted.

    Images are aligned at the upper left corner; "image_id" names both.

    Args:
        one: Sample with "image" uint8 [3, h, w], "instances" and possibly "teacher_instances".
        other: Sample of the same form, of any size.
        share: Weight of `one`, in [0, 1].
        fill: Colour of pixels that only the other image has.

    Returns:
        A sample whose image is as large as the larger of each side.
    """
    height, width = (max(s["image"].shape[axis] for s in (one, other)) for axis in (1, 2))
    pixels = [_on_canvas(sample["image"], height, width, fill) for sample in (one, other)]
    mixed = torch.lerp(pixels[1], pixels[0], share).round_().to(torch.uint8)
    return {
        **one,
        "image": mixed,
        "image_id": f"{one['image_id']}&{other['image_id']}",
        **{
            key: _concatenate(one[key], other[key], height, width)
            for key in ("instances", "teacher_instances")
            if key in one
        },
    }


def _on_canvas(image: Tensor, height: int, width: int, fill: Sequence[int]) -> Tensor:
    """Pad uint8 [3, h, w] to float32 [3, height, width]."""
    canvas = torch.tensor(fill, dtype=torch.float32)[:, None, None].repeat(1, height, width)
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return canvas


def _concatenate(one: Instances, other: Instances, height: int, width: int) -> Instances:
    """Concatenate the objects of both on a canvas of this size."""
    instances = Instances((height, width))
    instances.gt_boxes = Boxes.cat([one.gt_boxes, other.gt_boxes])
    instances.gt_classes = torch.cat((one.gt_classes, other.gt_classes))
    if one.has("scores"):
        instances.scores = torch.cat((one.scores, other.scores))
    if one.has("gt_masks"):
        masks = [part.gt_masks.tensor for part in (one, other)]
        padded = [F.pad(m, (0, width - m.shape[2], 0, height - m.shape[1])) for m in masks]
        instances.gt_masks = BitMasks(torch.cat(padded))
    return instances
