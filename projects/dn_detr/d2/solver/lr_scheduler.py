"""Learning-rate schedules of Detectron2, and flat-cosine."""

from __future__ import annotations

import torch
from detectron2.solver.build import build_lr_scheduler as build_detectron2_scheduler
from detectron2.solver.lr_scheduler import LRMultiplier, WarmupParamScheduler
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    ParamScheduler,
)

from dn_detr.errors import InputError

FLAT_COSINE = "WarmupFlatCosineLR"
NAMES = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR", FLAT_COSINE)
WARMUPS = ("linear", "constant", "quadratic")


def build_lr_scheduler(cfg, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """Build SOLVER.LR_SCHEDULER_NAME with its warm-up for MAX_ITER iterations.

    Raises:
        InputError: If a value of SOLVER is invalid.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME not in NAMES:
        raise InputError(
            f"SOLVER.LR_SCHEDULER_NAME must be one of {', '.join(NAMES)}, "
            f"got {solver.LR_SCHEDULER_NAME!r}."
        )
    if solver.WARMUP_METHOD not in WARMUPS:
        raise InputError(
            f"SOLVER.WARMUP_METHOD must be one of {', '.join(WARMUPS)}, "
            f"got {solver.WARMUP_METHOD!r}."
        )
    if not 0 <= solver.BASE_LR_END <= solver.BASE_LR:
        raise InputError(
            f"SOLVER.BASE_LR_END must be in [0, BASE_LR {solver.BASE_LR:g}], "
            f"got {solver.BASE_LR_END:g}."
        )
    if solver.LR_SCHEDULER_NAME == FLAT_COSINE:
        multiplier = warmed_up(flat_cosine(solver), solver)
        return LRMultiplier(optimizer, multiplier=multiplier, max_iter=solver.MAX_ITER)
    if solver.WARMUP_METHOD == "quadratic":
        raise InputError(
            f"SOLVER.WARMUP_METHOD 'quadratic' needs SOLVER.LR_SCHEDULER_NAME '{FLAT_COSINE}', "
            f"got {solver.LR_SCHEDULER_NAME!r}."
        )
    # Detectron2 ignores steps after the end of the training but fails on one at its very end.
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.STEPS = tuple(step for step in solver.STEPS if step != solver.MAX_ITER)
    return build_detectron2_scheduler(cfg, optimizer)


def flat_cosine(solver) -> ParamScheduler:
    """Build a flat-cosine schedule (DEIM, 2412.04234, sec. 4).

    The multiplier is 1 for FLAT_ITERS iterations, then falls along half a cosine to
    BASE_LR_END / BASE_LR, and stays there for the last FINAL_ITERS.
    """
    total, flat, final = solver.MAX_ITER, solver.FLAT_ITERS, solver.FINAL_ITERS
    if flat < 0 or final < 0 or flat + final >= total:
        raise InputError(
            "SOLVER.FLAT_ITERS and SOLVER.FINAL_ITERS must leave iterations for the cosine among "
            f"the {total} of SOLVER.MAX_ITER, got {flat} and {final}."
        )
    end = solver.BASE_LR_END / solver.BASE_LR
    parts = [
        (ConstantParamScheduler(1.0), flat),
        (CosineParamScheduler(1.0, end), total - flat - final),
        (CosineParamScheduler(end, end), final),  # ConstantParamScheduler fails at 1.0
    ]
    return _sequence([(part, iterations / total) for part, iterations in parts if iterations])


def warmed_up(schedule: ParamScheduler, solver) -> ParamScheduler:
    """Prepend a warm-up from WARMUP_FACTOR in the first WARMUP_ITERS iterations to a schedule."""
    share = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    if solver.WARMUP_METHOD != "quadratic":
        return WarmupParamScheduler(
            schedule, solver.WARMUP_FACTOR, share, solver.WARMUP_METHOD, solver.RESCALE_INTERVAL
        )
    return _QuadraticWarmup(schedule, solver.WARMUP_FACTOR, share)


class _QuadraticWarmup(ParamScheduler):
    """Quadratic increase to the value of `schedule` at the fraction `share` of the training."""

    def __init__(self, schedule: ParamScheduler, factor: float, share: float):
        self.schedule = schedule
        self.factor = factor
        self.share = share

    def __call__(self, where: float) -> float:
        if where >= self.share:
            return self.schedule(where)
        start, end = self.factor * self.schedule(0.0), self.schedule(self.share)
        return start + (end - start) * (where / self.share) ** 2


def _sequence(parts: list[tuple[ParamScheduler, float]]) -> ParamScheduler:
    """Chain schedules, each running from its start to its end in its fraction of the training."""
    return CompositeParamScheduler(
        [part for part, _ in parts],
        lengths=[share for _, share in parts],
        interval_scaling=["rescaled"] * len(parts),
    )
