"""What the images of one iteration share, so that it can be computed in parts."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from detectron2.utils import comm
from torch import Tensor
from torch.nn import functional as F

from dn_detr.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BatchStats:
    """What losses and shapes of an image take from the batch that it stands in.

    num_objects: in this process's images, averaged over the processes and at least 1: the losses'
    normaliser. most_objects: in one of this process's images, at least 1. height, width: of its
    tallest and of its widest image. num_teacher_boxes: as num_objects, of a teacher's boxes.
    """

    num_objects: float | Tensor
    most_objects: int
    height: int
    width: int
    num_teacher_boxes: float | Tensor = 1.0

    def pad(self, images: Tensor, multiple_of: int) -> Tensor:
        """Images [B, C, h, w] on the canvas of the whole batch, with zeros below and to the right.

        multiple_of: what its sides are rounded up to, as those of the images are already.
        """
        step = max(1, multiple_of)
        height, width = (-(-side // step) * step for side in (self.height, self.width))
        return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))


def batch_stats(samples: list[dict], device: torch.device) -> BatchStats:
    """Of the training samples of this process. Every process must call it together."""
    counts = [len(sample["instances"]) for sample in samples]
    num_taught = sum(len(sample.get("teacher_instances", ())) for sample in samples)
    normalisers: tuple | Tensor = max(1.0, float(sum(counts))), max(1.0, float(num_taught))
    if comm.get_world_size() > 1:
        total = torch.tensor([float(sum(counts)), float(num_taught)], device=device)
        torch.distributed.all_reduce(total)
        normalisers = (total / comm.get_world_size()).clamp(min=1)
    return BatchStats(
        num_objects=normalisers[0],
        num_teacher_boxes=normalisers[1],
        most_objects=max(1, *counts),
        height=max(sample["image"].shape[-2] for sample in samples),
        width=max(sample["image"].shape[-1] for sample in samples),
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
            "SOLVER.ACCUMULATE needs MODEL.DN_DETR.LOSS.KIND 'focal' or 'mal': the softmax loss is a "
            "mean over the slots of a whole batch, which its parts cannot know."
        )
    if parts > 1 and cfg.MODEL.META_ARCHITECTURE == "DenoisingRCNN":
        raise InputError(
            "SOLVER.ACCUMULATE works on the pages of dn_detr.methods alone: the losses of Faster R-CNN "
            "are means over the regions of a whole batch."
        )
    logger.info(
        f"{cfg.SOLVER.IMS_PER_BATCH} images for each step of the optimizer: {processes} x {images} "
        f"(processes x images), {images // parts} at a time"
    )
    return parts
