"""The schedules of the learning rate."""

import math

import pytest
from detectron2.config import get_cfg
from torch import nn

from dn_detr.d2 import add_dn_detr_config
from dn_detr.d2.engine.trainer import Trainer
from dn_detr.d2.solver.optimizer import build_optimizer
from dn_detr.errors import InputError


def rates(**solver) -> list[float]:
    """The learning rate of every iteration."""
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    for name, value in {"BASE_LR": 1.0, "WARMUP_ITERS": 0, "STEPS": (), **solver}.items():
        cfg.SOLVER[name] = value
    optimizer = build_optimizer(cfg, nn.Linear(1, 1))
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    seen = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_a_step_at_the_very_end_of_the_schedule_is_ignored():
    assert rates(MAX_ITER=4, STEPS=(2, 4)) == pytest.approx([1.0, 1.0, 0.1, 0.1])


def test_cosine():
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)]
    cosine = rates(LR_SCHEDULER_NAME="WarmupCosineLR", MAX_ITER=5, BASE_LR_END=0.2)
    assert cosine == pytest.approx(expected)


FLAT = {"LR_SCHEDULER_NAME": "WarmupFlatCosineLR", "MAX_ITER": 10, "BASE_LR_END": 0.5}


def test_flat_cosine_is_flat_then_a_cosine_then_flat():
    expected = [1.0] * 4 + [0.5 + 0.5 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert rates(**FLAT, FLAT_ITERS=4, FINAL_ITERS=2) == pytest.approx([*expected, 0.5, 0.5])


def test_flat_cosine_may_be_a_cosine_alone():
    assert rates(**FLAT) == pytest.approx(rates(**{**FLAT, "LR_SCHEDULER_NAME": "WarmupCosineLR"}))


@pytest.mark.parametrize(("total", "flat", "final"), [(1000, 580, 80), (100, 0, 7), (30, 3, 0)])
def test_flat_cosine_lasts_to_the_end(total, flat, final):
    """Detectron2 asks once more behind the last iteration."""
    found = rates(**{**FLAT, "MAX_ITER": total}, FLAT_ITERS=flat, FINAL_ITERS=final)
    assert len(found) == total and found[-1] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("method", "power"), [("linear", 1), ("quadratic", 2)])
def test_the_warm_up_rises_from_its_factor(method, power):
    warm = {"WARMUP_ITERS": 4, "WARMUP_FACTOR": 0.2, "WARMUP_METHOD": method}
    found = rates(**FLAT, FLAT_ITERS=6, **warm)
    assert found[:4] == pytest.approx([0.2 + 0.8 * (i / 4) ** power for i in range(4)])
    assert found[4:] == pytest.approx(rates(**FLAT, FLAT_ITERS=6)[4:])


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        ({"LR_SCHEDULER_NAME": "Cosine"}, "must be one of WarmupMultiStepLR, .* got 'Cosine'"),
        ({"WARMUP_METHOD": "slow"}, "WARMUP_METHOD must be one of linear, constant, quadratic"),
        ({"WARMUP_METHOD": "quadratic"}, "needs SOLVER.LR_SCHEDULER_NAME 'WarmupFlatCosineLR'"),
        ({**FLAT, "FLAT_ITERS": 8, "FINAL_ITERS": 2}, "among the 10 .*, got 8 and 2"),
        ({"BASE_LR_END": 2.0}, r"BASE_LR_END must be in \[0, BASE_LR 1\], got 2"),
    ],
)
def test_schedules_that_do_not_exist_are_refused(solver, words):
    with pytest.raises(InputError, match=words):
        rates(**solver)


def test_another_number_of_processes_scales_everything_that_counts_iterations():
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.MAX_ITER = 8, 1000
    cfg.SOLVER.FLAT_ITERS, cfg.SOLVER.FINAL_ITERS, cfg.SOLVER.EMA.WARMUP = 600, 100, 200
    cfg.SOLVER.BASE_LR_END, cfg.INPUT.SCHEDULE = 1e-6, [10, 600, 900]
    cfg.freeze()
    assert Trainer.auto_scale_workers(cfg, 8) is cfg
    scaled = Trainer.auto_scale_workers(cfg, 4)
    solver = scaled.SOLVER
    assert (solver.MAX_ITER, solver.FLAT_ITERS, solver.FINAL_ITERS) == (2000, 1200, 200)
    assert (solver.EMA.WARMUP, solver.BASE_LR_END) == (400, 5e-7)
    assert scaled.INPUT.SCHEDULE == [20, 1200, 1800] and scaled.is_frozen()
    assert cfg.SOLVER.FLAT_ITERS == 600  # the original stays
