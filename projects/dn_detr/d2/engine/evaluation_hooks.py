"""Hooks that run right after each evaluation of Detectron2's EvalHook."""

from __future__ import annotations

from detectron2.engine import HookBase
from fvcore.common.checkpoint import PeriodicCheckpointer


class AfterEvaluation(HookBase):
    """Call `after_evaluation` exactly when an `EvalHook` of this period has evaluated."""

    def __init__(self, period: int):
        self.period = period

    def after_evaluation(self) -> None:
        """Process the results of an evaluation."""
        raise NotImplementedError

    def after_step(self):
        done = self.trainer.iter + 1
        if self.period > 0 and done % self.period == 0 and done != self.trainer.max_iter:
            self.after_evaluation()

    def after_train(self):
        if self.trainer.iter == self.trainer.max_iter:  # else the last iteration failed
            self.after_evaluation()


class SaveEvaluation(AfterEvaluation):
    """Write the periodic checkpoint of this iteration again, with the hooks' evaluation results.

    A resumed training then has them. The first write comes before the evaluation, which may fail.
    """

    def __init__(self, period: int, checkpointer, checkpoint_period: int):
        super().__init__(period)
        self.checkpointer = checkpointer
        self.checkpoint_period = checkpoint_period

    def after_evaluation(self):
        saver = PeriodicCheckpointer(
            self.checkpointer, self.checkpoint_period, max_iter=self.trainer.max_iter
        )
        saver.step(min(self.trainer.iter, self.trainer.max_iter - 1))
