"""Hooks that save the best checkpoint by an evaluation metric and stop a training early."""

from __future__ import annotations

import difflib
import logging
import math

from detectron2.engine import hooks
from detectron2.utils.events import EventStorage

from dn_detr.d2.engine.collective import run_on_main_rank
from dn_detr.d2.engine.milestones import AfterEvaluation
from dn_detr.errors import InputError

logger = logging.getLogger(__name__)

MODES = ("max", "min")


class SaveBest(AfterEvaluation, hooks.BestCheckpointer):
    """Detectron2's BestCheckpointer that checks the metric's name and keeps the best on resume.

    It writes model_best.pth, which `--resume` does not use.
    """

    def after_evaluation(self):
        def save() -> None:
            metric(self.trainer.storage, self._val_metric, "TEST.BEST.METRIC")
            self._best_checking()

        run_on_main_rank(save)

    def after_step(self):
        """Do nothing: `Milestones` calls `after_evaluation`."""

    def after_train(self):
        """Do nothing: `Milestones` calls `after_evaluation`."""

    def state_dict(self) -> dict:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state: dict) -> None:
        self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]


class EarlyStopping(AfterEvaluation):
    """Stop the training when a metric has not improved for several evaluations in a row.

    The last weights become model_final.pth. A training that was stopped ends at once when resumed.

    Args:
        name: Name of the metric.
        patience: Evaluations in a row without improvement.
        mode: "max" or "min".
    """

    def __init__(self, *, name: str, patience: int, mode: str):
        self.name = name
        self.patience = patience
        self.sign = 1 if mode == "max" else -1
        self.best = -math.inf
        self.num_worse = 0

    def after_evaluation(self):
        storage = self.trainer.storage
        value = self.sign * run_on_main_rank(
            lambda: metric(storage, self.name, "TEST.EARLY_STOP.METRIC")
        )
        if value > self.best:  # False for NaN
            self.best, self.num_worse = value, 0
        else:
            self.num_worse += 1

    def verdict(self) -> str:
        if self.num_worse < self.patience:
            return ""
        return (
            f"stopped early: {self.name} has not been better than {self.sign * self.best:g} in "
            f"the last {self.num_worse} evaluations (TEST.EARLY_STOP)"
        )

    def state_dict(self) -> dict:
        return {"best": self.best, "num_worse": self.num_worse}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.num_worse = float(state["best"]), int(state["num_worse"])


def metric(storage: EventStorage, name: str, key: str) -> float:
    """Return a metric of the evaluation at the current iteration; InputError if there is none.

    key is the configuration key for the message, which lists all metrics.
    """
    found = {
        metric: value
        for metric, (value, iteration) in storage.latest().items()
        if iteration == storage.iter and "/" in metric
    }
    if name not in found:
        close = difflib.get_close_matches(name, found, n=1)
        hint = f", perhaps {close[0]!r}" if close else ""
        raise InputError(
            f"{key} must be a metric of this evaluation{hint}, got {name!r}; available: "
            f"{', '.join(sorted(found)) or 'none'}."
        )
    return found[name]


def build_best(cfg, checkpointer) -> list[AfterEvaluation]:
    """Build the hooks of TEST.BEST and TEST.EARLY_STOP."""
    best, early, period = cfg.TEST.BEST, cfg.TEST.EARLY_STOP, cfg.TEST.EVAL_PERIOD
    for key, node in (("TEST.BEST", best), ("TEST.EARLY_STOP", early)):
        if node.METRIC and (node.MODE not in MODES or period < 1):
            raise InputError(
                f"{key}.METRIC needs {key}.MODE 'max' or 'min' and a TEST.EVAL_PERIOD of at least "
                f"1, got {node.MODE!r} and {period}."
            )
    if early.METRIC and early.PATIENCE < 1:
        raise InputError(f"TEST.EARLY_STOP.PATIENCE must be at least 1, got {early.PATIENCE}.")
    built: list[AfterEvaluation] = []
    if best.METRIC:
        built.append(SaveBest(period, checkpointer, best.METRIC, best.MODE))
    if early.METRIC:
        built.append(EarlyStopping(name=early.METRIC, patience=early.PATIENCE, mode=early.MODE))
    return built
