"""Learning-rate schedules: Detectron2's, and flat-cosine, of fvcore's parts."""

from __future__ import annotations

import torch
from detectron2.solver.build import build_lr_scheduler as detectron2s
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
    """SOLVER.LR_SCHEDULER_NAME for MAX_ITER iterations, after its warm-up."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME not in NAMES:
        raise InputError(
            f"SOLVER.LR_SCHEDULER_NAME must be one of {', '.join(NAMES)}, "
            f"got {solver.LR_SCHEDULER_NAME!r}."
        )
    if solver.WARMUP_METHOD not in WARMUPS:
        raise InputError(
            f"SOLVER.WARMUP_METHOD must be one of {', '.join(WARMUPS)}, got {solver.WARMUP_METHOD!r}."
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
    return detectron2s(cfg, optimizer)


def flat_cosine(solver) -> ParamScheduler:
    """1 for FLAT_ITERS iterations, half a cosine down to BASE_LR_END / BASE_LR, and that for the last
    FINAL_ITERS (2412.04234, sec. 4)."""
    total, flat, final = solver.MAX_ITER, solver.FLAT_ITERS, solver.FINAL_ITERS
    if flat < 0 or final < 0 or flat + final >= total:
        raise InputError(
            f"SOLVER.FLAT_ITERS and SOLVER.FINAL_ITERS must leave iterations for the cosine among the "
            f"{total} of SOLVER.MAX_ITER, got {flat} and {final}."
        )
    end = solver.BASE_LR_END / solver.BASE_LR
    parts = [
        (ConstantParamScheduler(1.0), flat),
        (CosineParamScheduler(1.0, end), total - flat - final),
        (CosineParamScheduler(end, end), final),  # a constant one fails behind the last iteration
    ]
    return _in_turn([(part, iterations / total) for part, iterations in parts if iterations])


def warmed_up(schedule: ParamScheduler, solver) -> ParamScheduler:
    """`schedule` behind a warm-up from WARMUP_FACTOR, in the first WARMUP_ITERS iterations."""
    share = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    if solver.WARMUP_METHOD != "quadratic":
        return WarmupParamScheduler(
            schedule, solver.WARMUP_FACTOR, share, solver.WARMUP_METHOD, solver.RESCALE_INTERVAL
        )
    return _Quadratic(schedule, solver.WARMUP_FACTOR, share)


class _Quadratic(ParamScheduler):
    """Rises with the square of the iterations to where `schedule` is after the share `share`."""

    def __init__(self, schedule: ParamScheduler, factor: float, share: float):
        self.schedule = schedule
        self.factor = factor
        self.share = share

    def __call__(self, where: float) -> float:
        if where >= self.share:
            return self.schedule(where)
        start, end = self.factor * self.schedule(0.0), self.schedule(self.share)
        return start + (end - start) * (where / self.share) ** 2


def _in_turn(parts: list[tuple[ParamScheduler, float]]) -> ParamScheduler:
    """Schedules one after the other, each for its share; each runs from its own beginning to end."""
    return CompositeParamScheduler(
        [part for part, _ in parts],
        lengths=[share for _, share in parts],
        interval_scaling=["rescaled"] * len(parts),
    )
