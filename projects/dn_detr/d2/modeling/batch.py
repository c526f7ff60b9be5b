"""One value for the images of a forward pass, made once: images, padding, targets, normalizers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.utils import comm
from torch import Tensor

from dn_detr.auxiliary.box_prompts import PromptedObjects
from dn_detr.errors import InputError
from dn_detr.structures import Targets

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BatchStats:
    """What losses and shapes take from the whole batch of a process, also for a part of it.

    Attributes:
        num_objects: averaged over the processes and at least 1: the normalizer of the losses.
        most_objects: in one image, at least 1.
        height, width: of the tallest and of the widest image, in pixels.
        num_teacher_boxes: as num_objects, of a teacher's boxes.
        requests: [N] what processes ask of each other, summed over them; None for one process.
    """

    num_objects: float | Tensor
    most_objects: int
    height: int
    width: int
    num_teacher_boxes: float | Tensor = 1.0
    requests: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The images of one forward pass and what is known about them (`DenoisingDETR.make_batch`).

    Attributes:
        images: [B, 3, H, W] normalized, zeros below and to the right of each image.
        padding: [B, H, W] bool, True outside the image.
        sizes: (height, width) of each image in pixels.
        output_sizes: (height, width) in pixels that detections are scaled to.
        targets: ground truth, in training.
        num_objects: normalizer of the losses.
        teacher_boxes: boxes of a teacher with scores, for Teach-DETR.
        num_teacher_boxes: normalizer of their losses.
        prompts: given objects, at inference.
    """

    images: Tensor
    padding: Tensor
    sizes: list[tuple[int, int]]
    output_sizes: list[tuple[int, int]]
    targets: Targets | None = None
    num_objects: float | Tensor = 1.0
    teacher_boxes: Targets | None = None
    num_teacher_boxes: float | Tensor = 1.0
    prompts: PromptedObjects | None = None


def batch_stats(
    samples: list[dict], device: torch.device, requests: Sequence[float] = ()
) -> BatchStats:
    """Of the training samples of this process. Every process must call it together.

    requests: N numbers, which are summed over the processes in the same all_reduce.
    """
    counts = [len(sample["instances"]) for sample in samples]
    num_taught = sum(len(sample.get("teacher_instances", ())) for sample in samples)
    normalizers: tuple | Tensor = max(1.0, float(sum(counts))), max(1.0, float(num_taught))
    asked = None
    if comm.get_world_size() > 1:
        total = torch.tensor([float(sum(counts)), float(num_taught), *requests], device=device)
        torch.distributed.all_reduce(total)
        normalizers = (total[:2] / comm.get_world_size()).clamp(min=1)
        asked = total[2:]
    return BatchStats(
        num_objects=normalizers[0],
        num_teacher_boxes=normalizers[1],
        most_objects=max(1, *counts),
        height=max(sample["image"].shape[-2] for sample in samples),
        width=max(sample["image"].shape[-1] for sample in samples),
        requests=asked,
    )


def num_parts(cfg) -> int:
    """SOLVER.ACCUMULATE, if this number of processes can follow it."""
    parts, processes = cfg.SOLVER.ACCUMULATE, comm.get_world_size()
    images = cfg.SOLVER.IMS_PER_BATCH // processes
    if parts < 1 or images % parts:
        raise InputError(
            f"SOLVER.ACCUMULATE must divide the {images} images that each process has of "
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}, got {parts}."
        )
    if parts > 1 and cfg.MODEL.DN_DETR.LOSS.KIND == "softmax":
        raise InputError(
            "SOLVER.ACCUMULATE needs MODEL.DN_DETR.LOSS.KIND 'focal' or 'mal': the softmax loss "
            "is a mean over the queries of a whole batch, which its parts do not have."
        )
    if parts > 1 and cfg.MODEL.META_ARCHITECTURE == "DenoisingRCNN":
        raise InputError(
            "SOLVER.ACCUMULATE works with DenoisingDETR only: the losses of Faster R-CNN "
            "are means over the regions of a whole batch."
        )
    logger.info(
        f"{cfg.SOLVER.IMS_PER_BATCH} images for each step of the optimizer: {processes} x {images} "
        f"(processes x images), {images // parts} at a time"
    )
    return parts
