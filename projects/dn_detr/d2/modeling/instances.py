"""Between Detectron2's Instances, in pixels, and the values of the core."""

from __future__ import annotations

import zlib

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from dn_detr.models.postprocess import Detections
from dn_detr.structures import Target, Targets, pad_targets


def noise_seed(seed: int, iteration: int, image_id: int | str) -> int:
    """An integer in [0, 2^63) from which all denoising noise of an image follows.

    It depends on nothing else, so that noise is the same after a resume and in any batch.
    """
    words = (seed, iteration, zlib.crc32(str(image_id).encode()))
    state = 0x9E3779B97F4A7C15
    for word in words:
        # The finaliser of SplitMix64 (Steele et al., 2014): every input bit reaches every output
        # bit.
        state = (state ^ (int(word) & 0xFFFFFFFFFFFFFFFF)) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class IterationCounter:
    """Gives an iteration to training forwards that are told none, so that noise changes from step
    to step in anybody's training loop: the number of such forwards before.
    """

    def __init__(self):
        self.forwards = 0

    def next(self, iteration: int | None) -> int:
        """`iteration`, or the next number where it is None."""
        if iteration is not None:
            return iteration
        self.forwards += 1
        return self.forwards - 1


def to_target(
    instances: Instances, *, num_classes: int, noise_seed: int, with_masks: bool = False
) -> Target:
    """Ground truth of one image: gt_boxes in pixels of the (augmented) image, gt_classes and, if
    asked for, gt_masks. A teacher's boxes have scores too.

    ValueError if a class is not in [0, num_classes).
    """
    height, width = instances.image_size
    x0, y0, x1, y1 = instances.gt_boxes.tensor.float().unbind(-1)
    boxes = torch.stack(
        (
            (x0 + x1) * (0.5 / width),
            (y0 + y1) * (0.5 / height),
            (x1 - x0) / width,
            (y1 - y0) / height,
        ),
        dim=-1,
    )
    labels = instances.gt_classes
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"gt_classes must be in [0, {num_classes}), got {sorted(set(labels.tolist()))}"
        )
    masks = instances.gt_masks.tensor if with_masks else None
    scores = instances.scores if instances.has("scores") else None
    return Target(labels=labels, boxes=boxes, masks=masks, scores=scores, noise_seed=noise_seed)


def with_image_ids(samples: list[dict]) -> list[dict]:
    """Samples of this process's whole batch; those without an "image_id" get "rank:position", so
    that neither parts of the batch nor ranks repeat their noise.
    """
    rank = comm.get_rank()
    return [
        sample if "image_id" in sample else {**sample, "image_id": f"{rank}:{position}"}
        for position, sample in enumerate(samples)
    ]


def to_targets(
    samples: list[dict],
    *,
    seed: int,
    iteration: int,
    num_classes: int,
    with_masks: bool = False,
    multiple_of: int = 1,
) -> Targets:
    """Ground truth of the training samples of a batch, on the host, with the noise keys of an
    iteration; multiple_of: see `pad_targets`.
    """
    targets = [
        to_target(
            sample["instances"],
            num_classes=num_classes,
            noise_seed=noise_seed(seed, iteration, sample["image_id"]),
            with_masks=with_masks,
        )
        for sample in with_image_ids(samples)
    ]
    return pad_targets(targets, multiple_of)


def teacher_targets(samples: list[dict], num_classes: int) -> Targets:
    """The boxes of a teacher for the training samples of a batch, with scores, on the host."""
    return pad_targets(
        [
            to_target(sample["teacher_instances"], num_classes=num_classes, noise_seed=0)
            for sample in samples
        ]
    )


def to_instances(detections: Detections, image_size: tuple[int, int]) -> Instances:
    """Detections of an image of (height, width) as pred_boxes, scores, pred_classes, pred_masks."""
    instances = Instances(image_size)
    instances.pred_boxes = Boxes(detections.boxes_xyxy_px)
    instances.scores = detections.scores
    instances.pred_classes = detections.labels
    if detections.masks is not None:
        instances.pred_masks = detections.masks
    return instances
