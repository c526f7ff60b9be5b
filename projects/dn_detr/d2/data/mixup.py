"""Mixed images: every image of a batch laid over the one before it (DEIM, 2412.04234)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor
from torch.nn import functional as F


def mix_batch(samples: list[dict], share: float, fill: Sequence[int]) -> list[dict]:
    """Each sample mixed with the one before it, the first with the last; see `mix`."""
    return [mix(sample, samples[i - 1], share, fill) for i, sample in enumerate(samples)]


def mix(one: dict, other: dict, share: float, fill: Sequence[int]) -> dict:
    """share x one + (1 - share) x other, with the objects and teachers' boxes of both, unweighted.

    Images of different size share the upper left corner; where there is only one, the other has the
    colour `fill`. "image_id" names both.
    """
    height, width = (max(s["image"].shape[axis] for s in (one, other)) for axis in (1, 2))
    pixels = [_on_canvas(sample["image"], height, width, fill) for sample in (one, other)]
    mixed = torch.lerp(pixels[1], pixels[0], share).round_().to(torch.uint8)
    return {
        **one,
        "image": mixed,
        "image_id": f"{one['image_id']}&{other['image_id']}",
        **{
            key: _together(one[key], other[key], height, width)
            for key in ("instances", "teacher_instances")
            if key in one
        },
    }


def _on_canvas(image: Tensor, height: int, width: int, fill: Sequence[int]) -> Tensor:
    """uint8 [3, h, w] -> float32 [3, height, width]."""
    canvas = torch.tensor(fill, dtype=torch.float32)[:, None, None].repeat(1, height, width)
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return canvas


def _together(one: Instances, other: Instances, height: int, width: int) -> Instances:
    """The objects of both, on a canvas that is as large as the larger of each side."""
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
