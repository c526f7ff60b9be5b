"""The length of a training in epochs, and the learning rate of another batch size."""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce

from detectron2.config import CfgNode

from dn_detr.d2.data.dataset_dicts import load_annotations
from dn_detr.errors import InputError

SCALED = ("SOLVER.WARMUP_ITERS", "SOLVER.FLAT_ITERS", "SOLVER.FINAL_ITERS", "SOLVER.EMA.WARMUP")
PERIODS = ("SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD")
"""Keys that count iterations; a period that is not 0 stays at least 1."""


def num_training_images(cfg: CfgNode) -> int:
    """Return the number of images that a training draws from; datasets must be registered."""
    counts = [load_annotations(name).num_objects for name in cfg.DATASETS.TRAIN]
    empty = 1 if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS else 0
    return int(sum((count >= empty).sum() for count in counts))


def use_epochs(cfg: CfgNode, given: Collection[str] = ()) -> list[str]:
    """Set all iteration counts by SOLVER.EPOCHS, in place, as the fractions of MAX_ITER they are.

    A configuration that this has changed stays as it is when it is changed again.

    Args:
        cfg: Its datasets must be registered.
        given: Keys that were set explicitly and stay; MAX_ITER among them excludes EPOCHS.

    Returns:
        A sentence on the result, or nothing if EPOCHS is 0, which must not be given on its own.
    """
    solver = cfg.SOLVER
    if "SOLVER.MAX_ITER" in given and solver.EPOCHS:
        if "SOLVER.EPOCHS" in given:
            raise InputError("give either SOLVER.EPOCHS (--epochs) or SOLVER.MAX_ITER, not both.")
        solver.EPOCHS = 0
    if not solver.EPOCHS:
        if "SOLVER.EPOCHS" in given and "SOLVER.MAX_ITER" not in given:
            raise InputError("SOLVER.EPOCHS (--epochs) must be above 0, got 0.")
        return []
    num_images = num_training_images(cfg)
    total = max(1, round(solver.EPOCHS * num_images / solver.IMS_PER_BATCH))
    factor = total / solver.MAX_ITER
    solver.MAX_ITER = total
    if "SOLVER.STEPS" not in given:
        solver.STEPS = tuple(round(step * factor) for step in solver.STEPS)
    if "INPUT.SCHEDULE" not in given:
        cfg.INPUT.SCHEDULE = [round(iteration * factor) for iteration in cfg.INPUT.SCHEDULE]
    for key in (*SCALED, *PERIODS):
        if key not in given:
            *path, name = key.split(".")
            node = reduce(getattr, path, cfg)
            least = 1 if key in PERIODS and node[name] > 0 else 0
            node[name] = max(least, round(node[name] * factor))
    return [
        f"{solver.EPOCHS:g} epochs of {num_images} images in batches of {solver.IMS_PER_BATCH}: "
        f"{total} iterations, evaluated every {cfg.TEST.EVAL_PERIOD}, saved every "
        f"{solver.CHECKPOINT_PERIOD}, learning rate lowered after "
        f"{', '.join(map(str, solver.STEPS)) or 'none'} (SOLVER.EPOCHS)"
    ]


def scale_learning_rate(cfg: CfgNode, written: CfgNode, given: Collection[str] = ()) -> list[str]:
    """Scale the learning rate to another batch size than the configuration's, in place.

    By the root of the batch for AdamW (Malladi et al., 2205.10287), in proportion to it for SGD
    (Goyal et al., 1706.02677).

    Args:
        cfg: Its BASE_LR changes.
        written: The configuration that BASE_LR was written for.
        given: Keys that were set explicitly: SOLVER.BASE_LR then stays.

    Returns:
        A sentence on the result, or nothing.
    """
    solver, batch = cfg.SOLVER, written.SOLVER.IMS_PER_BATCH
    if batch == solver.IMS_PER_BATCH or "SOLVER.BASE_LR" in given:
        return []
    is_sgd = solver.OPTIMIZER == "SGD"
    factor = (solver.IMS_PER_BATCH / batch) ** (1.0 if is_sgd else 0.5)
    solver.BASE_LR *= factor
    solver.BASE_LR_END *= factor
    rule = "in proportion to" if is_sgd else "with the square root of"
    return [
        f"learning rate {solver.BASE_LR:.3g} instead of {written.SOLVER.BASE_LR:.3g}: it follows "
        f"{rule} the batch, {solver.IMS_PER_BATCH} instead of {batch} (SOLVER.BASE_LR fixes it)"
    ]
