"""Dense O2O (DEIM, 2412.04234, sec. 3.2): more objects in an image by mosaics and mixed images, and the
schedule that switches them on and off by iteration.

Everything drawn here follows from the seed and a position of the training stream, so that a resumed
training sees the same, and images that are no mosaics are augmented as they would be without any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from detectron2.utils import comm

from dn_detr.d2.data.mapper import DetrMapper
from dn_detr.d2.data.mixup import mix_batch
from dn_detr.d2.data.mosaic import Mosaic, RandomAffine, check_mosaic
from dn_detr.errors import InputError

_MOSAIC, _MIXUP = 2, 3  # first words of seeds, beside those of the loader


@dataclass(frozen=True)
class Schedule:
    """Iterations [first, flat, last): mosaics and mixed images from first to flat, crops from first
    to last. None as last: without end."""

    first: int = 0
    flat: int | None = None
    last: int | None = None

    def is_dense(self, iteration: int) -> bool:
        return self.first <= iteration and (self.flat is None or iteration < self.flat)

    def is_calm(self, iteration: int) -> bool:
        """Neither mosaics nor mixed images nor crops."""
        return iteration < self.first or (self.last is not None and iteration >= self.last)


class DenseO2O:
    """What becomes of the images of an iteration.

    calm: the mapper without crops. mosaic: four records -> sample; None: no mosaics. blend: the least
    and the largest share of an image in its mixture; None: none are mixed. Probabilities are those in
    the iterations that the schedule calls dense.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        calm: Callable[[dict], dict],
        mosaic: Mosaic | None,
        mosaic_probability: float,
        blend: tuple[float, float] | None,
        mixup_probability: float,
        fill: tuple[int, int, int],
    ):
        self.schedule = schedule
        self.calm = calm
        self.mosaic = mosaic
        self.mosaic_probability = mosaic_probability
        self.blend = blend
        self.mixup_probability = mixup_probability
        self.fill = fill

    def sample(
        self, mapper, records, index: int, iteration: int, *, seed: int, position: int
    ) -> dict:
        """The sample at this position of the stream: of image `index`, or a mosaic that begins with it."""
        others = self.partners(iteration, len(records), seed=seed, position=position)
        if others is not None:
            return self.mosaic([records[i] for i in (index, *others)])
        if self.schedule.is_calm(iteration):
            mapper = self.calm
        return mapper(records[index])

    def batch(
        self, samples: list[dict], iteration: int, *, seed: int, first_position: int
    ) -> list[dict]:
        """The samples of one process, or their mixtures."""
        share = self.share(iteration, seed=seed, first_position=first_position)
        return samples if share is None else mix_batch(samples, share, self.fill)

    def partners(
        self, iteration: int, num_images: int, *, seed: int, position: int
    ) -> list[int] | None:
        """The three images that make a mosaic of the one at this position; None: it stays alone."""
        if self.mosaic is None or not self.schedule.is_dense(iteration):
            return None
        drawn = np.random.default_rng([_MOSAIC, seed, position])
        if drawn.random() >= self.mosaic_probability:
            return None
        return drawn.integers(num_images, size=3).tolist()

    def share(self, iteration: int, *, seed: int, first_position: int) -> float | None:
        """How much each image has of its mixture; None: this batch is not mixed."""
        if self.blend is None or not self.schedule.is_dense(iteration):
            return None
        drawn = np.random.default_rng([_MIXUP, seed, first_position])
        if drawn.random() >= self.mixup_probability:
            return None
        return float(drawn.uniform(*self.blend))

    def describe(self, num_iterations: int) -> str:
        """What is done when, in a training of so many iterations, and to which share of its images."""
        first, flat, last = (
            num_iterations if number is None else number
            for number in (self.schedule.first, self.schedule.flat, self.schedule.last)
        )
        kinds = {
            "mosaics": self.mosaic_probability if self.mosaic else 0,
            "mixed": self.mixup_probability if self.blend else 0,
        }
        phases = [
            (0, first, "no crops, mosaics or mixed images"),
            (first, flat, _shares(kinds, 1.0)),
            (flat, last, "no mosaics or mixed images"),
            (last, num_iterations, "no crops, mosaics or mixed images"),
        ]
        lines = [f"  iterations {a} to {b - 1}: {text}" for a, b, text in phases if a < b]
        in_all = _shares(kinds, (flat - first) / num_iterations)
        return "\n".join(["augmentation by iteration", *lines, f"  of all images: {in_all}"])


def build_dense_o2o(cfg, mapper: Callable[[dict], dict] | None = None) -> DenseO2O | None:
    """Of INPUT.SCHEDULE, MOSAIC and MIXUP, for the process that calls it; None where all are off.

    mapper: of one's own, in place of `DetrMapper`. InputError where the keys cannot be followed.
    """
    mosaic, mixup = cfg.INPUT.MOSAIC, cfg.INPUT.MIXUP
    schedule = _schedule(cfg)
    if not (mosaic.ENABLED or mixup.ENABLED or cfg.INPUT.SCHEDULE):
        return None
    for name, node in (("MOSAIC", mosaic), ("MIXUP", mixup)):
        if not 0 <= node.PROBABILITY <= 1:
            raise InputError(
                f"INPUT.{name}.PROBABILITY must be in [0, 1], got {node.PROBABILITY:g}."
            )
    low, high = mixup.BLEND
    if not 0 <= low <= high <= 1:
        raise InputError(f"INPUT.MIXUP.BLEND must rise within [0, 1], got {mixup.BLEND}.")
    images = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    if mixup.ENABLED and images < 2:
        raise InputError(
            "INPUT.MIXUP mixes the images of a process with each other and needs two or more, but "
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} gives each process {images}."
        )
    check_mosaic(mosaic)
    # As padding: nothing, to the network.
    fill = tuple(round(value) for value in cfg.MODEL.PIXEL_MEAN)
    return DenseO2O(
        schedule=schedule,
        calm=mapper or _calm_mapper(cfg),
        mosaic=_mosaic(cfg, fill) if mosaic.ENABLED else None,
        mosaic_probability=mosaic.PROBABILITY,
        blend=tuple(mixup.BLEND) if mixup.ENABLED else None,
        mixup_probability=mixup.PROBABILITY,
        fill=fill,
    )


def _shares(kinds: dict[str, float], of: float) -> str:
    parts = [f"{share * of:.1%} {kind}" for kind, share in kinds.items() if share]
    return ", ".join(parts) or "no mosaics or mixed images"


def _schedule(cfg) -> Schedule:
    numbers, total = list(cfg.INPUT.SCHEDULE), cfg.SOLVER.MAX_ITER
    if not numbers:
        return Schedule()
    rises = len(numbers) == 3 and 0 <= numbers[0] <= numbers[1] <= numbers[2] <= total
    if not rises:
        raise InputError(
            "INPUT.SCHEDULE must be three iterations [first, flat, last] that rise, none of them "
            f"behind SOLVER.MAX_ITER {total}, got {numbers}."
        )
    if numbers[0] == numbers[1] and (cfg.INPUT.MOSAIC.ENABLED or cfg.INPUT.MIXUP.ENABLED):
        raise InputError(
            f"INPUT.SCHEDULE {numbers} leaves no iteration to INPUT.MOSAIC and INPUT.MIXUP: its "
            "second number must be larger than its first."
        )
    return Schedule(*numbers)


def _calm_mapper(cfg) -> DetrMapper:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.CROP.ENABLED = False
    return DetrMapper(cfg, True)


def _mosaic(cfg, fill: tuple[int, int, int]) -> Mosaic:
    """Behind the mosaic comes what `DetrMapper` does without crops."""
    node = cfg.INPUT.MOSAIC
    affine = RandomAffine(
        rotation=node.ROTATION, translation=node.TRANSLATION, scale=node.SCALE, fill=fill
    )
    return Mosaic(
        size=node.SIZE,
        min_visible=node.MIN_VISIBLE,
        fill=fill,
        augmentations=[affine, *_calm_mapper(cfg).augmentations.augs],
        image_format=cfg.INPUT.FORMAT,
        with_masks=cfg.MODEL.MASK_ON,
        with_teacher=cfg.MODEL.DN_DETR.TEACH.ENABLED,
    )
