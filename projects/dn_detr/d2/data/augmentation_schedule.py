"""Dense O2O augmentation (DEIM, 2412.04234, sec. 3.2): mosaics and mixed images by iteration.

All random draws depend only on the seed and a position in the training stream. A resumed training
repeats them, and images outside mosaics get the same augmentation as without mosaics.
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

_MOSAIC, _MIXUP = 2, 3  # first words of seeds; the loader uses 0, 1 and 4


@dataclass(frozen=True)
class Schedule:
    """Iterations at which augmentations start and stop.

    Args:
        first: First iteration with mosaics, mixed images and crops.
        flat: First iteration without mosaics and mixed images; None means never.
        last: First iteration without crops; None means never.
    """

    first: int = 0
    flat: int | None = None
    last: int | None = None

    def is_dense(self, iteration: int) -> bool:
        """Return whether this iteration uses mosaics and mixed images."""
        return self.first <= iteration and (self.flat is None or iteration < self.flat)

    def is_calm(self, iteration: int) -> bool:
        """Return whether this iteration uses neither mosaics nor mixed images nor crops."""
        return iteration < self.first or (self.last is not None and iteration >= self.last)


class DenseO2O:
    """Apply mosaics and mixed images to the samples of an iteration.

    Args:
        schedule: Iterations in which they are used.
        calm: Mapper without crops.
        mosaic: Maps four records to one sample; None disables mosaics.
        mosaic_probability: Probability of a mosaic per image, in dense iterations.
        blend: Smallest and largest weight of an image in its mixture; None disables mixing.
        mixup_probability: Probability of mixing a batch, in dense iterations.
        fill: Colour of empty pixels, in the channel order of the images.
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
        """Return the sample at a stream position: image `index`, or a mosaic starting with it."""
        others = self.partners(iteration, len(records), seed=seed, position=position)
        if others is not None:
            return self.mosaic([records[i] for i in (index, *others)])
        if self.schedule.is_calm(iteration):
            mapper = self.calm
        return mapper(records[index])

    def batch(
        self, samples: list[dict], iteration: int, *, seed: int, first_position: int
    ) -> list[dict]:
        """Return the samples of one process, mixed with `mixup_probability` in dense iterations."""
        share = self.share(iteration, seed=seed, first_position=first_position)
        return samples if share is None else mix_batch(samples, share, self.fill)

    def partners(
        self, iteration: int, num_images: int, *, seed: int, position: int
    ) -> list[int] | None:
        """Draw the other three images of a mosaic at this position, or None for no mosaic."""
        if self.mosaic is None or not self.schedule.is_dense(iteration):
            return None
        rng = np.random.default_rng([_MOSAIC, seed, position])
        if rng.random() >= self.mosaic_probability:
            return None
        return rng.integers(num_images, size=3).tolist()

    def share(self, iteration: int, *, seed: int, first_position: int) -> float | None:
        """Draw the weight of each image in its mixture, or None for an unmixed batch."""
        if self.blend is None or not self.schedule.is_dense(iteration):
            return None
        rng = np.random.default_rng([_MIXUP, seed, first_position])
        if rng.random() >= self.mixup_probability:
            return None
        return float(rng.uniform(*self.blend))

    def describe(self, num_iterations: int) -> str:
        """Describe the phases of a training for the log, with the fraction of affected images."""
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
    """Build Dense O2O from INPUT.SCHEDULE, MOSAIC and MIXUP; None if all are off.

    Args:
        cfg: Configuration of the training.
        mapper: Custom mapper to use instead of `DetrMapper`.

    Raises:
        InputError: If a value is invalid.
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
        raise InputError(
            f"INPUT.MIXUP.BLEND must be two increasing values in [0, 1], got {mixup.BLEND}."
        )
    images = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    if mixup.ENABLED and images < 2:
        raise InputError(
            "INPUT.MIXUP mixes the images of a process with each other and needs two or more, but "
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} gives each process {images}."
        )
    check_mosaic(mosaic)
    # The mean colour, which is 0 after normalisation, like padding.
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
    steps, total = list(cfg.INPUT.SCHEDULE), cfg.SOLVER.MAX_ITER
    if not steps:
        return Schedule()
    if not (len(steps) == 3 and 0 <= steps[0] <= steps[1] <= steps[2] <= total):
        raise InputError(
            "INPUT.SCHEDULE must be three increasing iterations [first, flat, last], none of them "
            f"after SOLVER.MAX_ITER {total}, got {steps}."
        )
    if steps[0] == steps[1] and (cfg.INPUT.MOSAIC.ENABLED or cfg.INPUT.MIXUP.ENABLED):
        raise InputError(
            f"INPUT.SCHEDULE {steps} leaves no iteration to INPUT.MOSAIC and INPUT.MIXUP: its "
            "second number must be larger than its first."
        )
    return Schedule(*steps)


def _calm_mapper(cfg) -> DetrMapper:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.CROP.ENABLED = False
    return DetrMapper(cfg, True)


def _mosaic(cfg, fill: tuple[int, int, int]) -> Mosaic:
    """Build the mosaic, followed by the augmentations of `DetrMapper` without crops."""
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
