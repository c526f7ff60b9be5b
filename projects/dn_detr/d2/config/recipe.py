"""`--recipe auto`: settings that follow from the training data, each with its reason.

Rules of thumb for small datasets, not measured optima: the reasons are printed so that they can be
judged, and explicit keys win.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from dn_detr.d2.config.unread_keys import why_unread
from dn_detr.d2.data.dataset_dicts import load_annotations

LEGIBLE = 20  # pixels that small objects should have after resizing
SEEN = 30_000  # images that a training on little data sees, over all epochs


@dataclass(frozen=True)
class DataStatistics:
    """What a recipe looks at, over all training images.

    Args:
        num_images: Images.
        num_classes: Classes.
        most_objects: Objects in the fullest image.
        shorter_side: Median of the shorter sides of the images, in pixels.
        aspect_ratio: Largest ratio of sides, up to 1% of the images.
        small_object: 10th percentile of the roots of box areas, in pixels; 0 without objects.
    """

    num_images: int
    num_classes: int
    most_objects: int
    shorter_side: int
    aspect_ratio: float
    small_object: float


@dataclass(frozen=True)
class Setting:
    """A value for a configuration key, and why."""

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"recipe: {self.key} {self.value}, {self.why}"


def statistics(cfg: CfgNode) -> DataStatistics:
    """Look at the training datasets of a configuration, which must be registered."""
    loaded = [load_annotations(name) for name in cfg.DATASETS.TRAIN]
    sizes = np.concatenate([one.truth.sizes for one in loaded])  # [images, 2] width, height
    sizes = np.where(np.isfinite(sizes), sizes, (1333, 800))  # unknown ones
    boxes = np.concatenate([one.truth.boxes[~one.truth.is_crowd] for one in loaded])
    sides = np.sqrt(boxes[:, 2] * boxes[:, 3])
    return DataStatistics(
        num_images=len(sizes),
        num_classes=len(loaded[0].class_names),
        most_objects=int(max(one.num_objects.max() for one in loaded)),
        shorter_side=int(np.median(sizes.min(1))),
        aspect_ratio=float(np.percentile(sizes.max(1) / sizes.min(1), 99)),
        small_object=float(np.percentile(sides, 10)) if len(sides) else 0.0,
    )


def recipe(data: DataStatistics, *, batch: int, size: int, is_trained: bool) -> list[Setting]:
    """Choose settings for a dataset.

    Args:
        data: The dataset.
        batch: Batch size of the configuration, the largest that is chosen.
        size: Its INPUT.MIN_SIZE_TEST, the largest that is chosen.
        is_trained: Whether training starts from a detector, whose queries stay, not a backbone.
    """
    enlarge = LEGIBLE / data.small_object if data.small_object else 1.0
    shorter = data.shorter_side * min(max(enlarge, 1.0), 2.0)
    shorter = min(size, max(32 * round(shorter / 32), min(size, 320)))
    longer = round(shorter * min(max(data.aspect_ratio, 4 / 3), 2.5))
    scales = sorted({32 * round(shorter * part / 32) for part in (0.7, 0.8, 0.9)} | {shorter})
    objects = (
        f"small objects have {data.small_object:.0f} px in images of {data.shorter_side} px "
        f"(shorter side), and the configuration allows {size}"
    )
    queries = min(max(50 * -(-3 * data.most_objects // 100), 100), 900)
    budget = min(max(5 * data.most_objects, 100), 500)
    updates = next(b for least, b in ((10_000, 16), (2_000, 8), (0, 4)) if data.num_images >= least)
    epochs = min(max(round(SEEN / data.num_images / (2 if is_trained else 1)), 12), 150)
    fullest = f"the fullest image has {data.most_objects} objects"
    found = [
        Setting("INPUT.MIN_SIZE_TEST", shorter, objects),
        Setting("INPUT.MIN_SIZE_TRAIN", tuple(scales), "0.7 to 1 times the size of the tests"),
        Setting("INPUT.MAX_SIZE_TEST", longer, f"sides differ by up to {data.aspect_ratio:.2g}"),
        Setting("INPUT.MAX_SIZE_TRAIN", longer, "as in the tests"),
        Setting("MODEL.DN_DETR.NUM_QUERIES", queries, f"{fullest}: half as many more, in fifties"),
        Setting("MODEL.DN_DETR.DENOISING.MAX_OBJECTS", budget, f"{fullest}: five groups of them"),
        Setting(
            "SOLVER.IMS_PER_BATCH", min(batch, updates), f"{data.num_images} images: many updates"
        ),
        Setting(
            "SOLVER.EPOCHS",
            epochs,
            f"about {epochs * data.num_images} images of {data.num_classes} classes are seen, from "
            f"{'a trained detector' if is_trained else 'a backbone'} on",
        ),
    ]
    return [one for one in found if not (is_trained and one.key.endswith("NUM_QUERIES"))]


def use_recipe(cfg: CfgNode, given: Collection[str]) -> list[str]:
    """Apply a recipe to a configuration, in place, except for the keys `given`.

    Returns:
        A line for each setting.
    """
    chosen = recipe(
        statistics(cfg),
        batch=cfg.SOLVER.IMS_PER_BATCH,
        size=cfg.INPUT.MIN_SIZE_TEST,
        is_trained="MODEL.WEIGHTS" in given,
    )
    lines = []
    for setting in chosen:
        is_length = setting.key == "SOLVER.EPOCHS" and "SOLVER.MAX_ITER" in given
        if setting.key in given or is_length or why_unread(cfg, setting.key):
            continue
        *path, name = setting.key.split(".")
        reduce(getattr, path, cfg)[name] = setting.value
        lines.append(str(setting))
    return lines
