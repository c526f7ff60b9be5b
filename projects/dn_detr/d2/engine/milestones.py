"""When a training saves, evaluates and ends, as a state that a resumed training takes up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from dn_detr.d2.engine.collective import run_on_main_rank
from dn_detr.d2.engine.writers import MetricsFile
from dn_detr.errors import InputError

logger = logging.getLogger(__name__)

FINAL = "model_final"


class StopEarly(Exception):
    """Raised to end a training regularly before its last iteration."""


class AfterEvaluation(HookBase):
    """Hook that is called after every evaluation, before its results are saved."""

    def after_evaluation(self) -> None:
        """Process the results of an evaluation, in the event storage at its iteration."""
        raise NotImplementedError

    def verdict(self) -> str:
        """Return why the training ends early, "" if it goes on."""
        return ""


class Milestones(HookBase):
    """Save and evaluate; a checkpoint knows which evaluation, and whether the end, is pending.

    A checkpoint is written before an evaluation, which may fail or be killed, and again after it.
    A training that is resumed from the first one makes up the evaluation. After the last iteration
    model_final.pth is written in the same two steps.

    Args:
        checkpointer: Writes the checkpoints.
        evaluate: Returns the metrics of an evaluation, as nested dictionaries.
        processing: Hooks to call after each evaluation, in this order.
        writers: Event writers, which write the metrics before a checkpoint counts them as done.
        eval_period: Iterations between evaluations; 0: only after the last.
        save_period: Iterations between checkpoints.
        save_minutes: Minutes after which a checkpoint is due as well; 0: never.
    """

    def __init__(
        self,
        checkpointer,
        evaluate: Callable[[], dict],
        processing: Sequence[AfterEvaluation],
        writers: Sequence[EventWriter],
        *,
        eval_period: int,
        save_period: int,
        save_minutes: float,
    ):
        self.checkpointer = checkpointer
        self.evaluate_model = evaluate
        self.processing = processing
        self.writers = writers
        self.eval_period = eval_period
        self.save_period = save_period
        self.save_minutes = save_minutes
        self.num_done = 0  # iterations, with their hooks
        self.saved: dict[int, str] = {}  # the last checkpoint, by its number of iterations
        self.save_time = time.monotonic()
        self.is_pending = False  # the evaluation after the last iteration done
        self.is_finished = False

    def state_dict(self) -> dict:
        return {"is_pending": self.is_pending, "is_finished": self.is_finished}

    def load_state_dict(self, state: dict) -> None:
        self.is_pending, self.is_finished = state["is_pending"], state["is_finished"]

    def before_train(self):
        trainer = self.trainer
        self.num_done = trainer.start_iter
        self.save_time = time.monotonic()
        if self.num_done:
            self.saved = {self.num_done: self.checkpointer.resumed}
        for writer in self.writers:
            if isinstance(writer, MetricsFile):
                # That after the last iteration has the number of the next one.
                evaluation = self.num_done - self.is_pending + self.is_finished
                writer.begin_at(self.num_done, evaluation)
        if self.num_done < trainer.max_iter and self.is_pending and self._is_eval_due():
            logger.info(f"making up the evaluation after iteration {self.num_done - 1}")
            trainer.iter = trainer.storage.iter = self.num_done - 1
            self.evaluate()
            trainer.iter = trainer.storage.iter = self.num_done
        if self.num_done < trainer.max_iter:
            self.stop_early()
            self.is_finished = False  # of a shorter training

    def after_step(self):
        self.num_done = self.trainer.iter + 1
        is_last = self.num_done == self.trainer.max_iter
        self.is_pending = is_last or self._is_eval_due()
        if self.num_done % self.save_period == 0 or self.trainer.is_save_due():
            self.save()
        if self.is_pending and not is_last:
            self.evaluate()
            self.stop_early()

    def after_train(self):
        if self.trainer.iter < self.trainer.max_iter or self.is_finished:
            return  # it was stopped, or resumed after its end
        self.save(FINAL)
        self.evaluate()
        self.is_finished = True
        self.save(FINAL)

    def is_minute_due(self) -> bool:
        """Whether SOLVER.CHECKPOINT_MINUTES have passed since the last checkpoint."""
        return 0 < self.save_minutes * 60 <= time.monotonic() - self.save_time

    def _is_eval_due(self) -> bool:
        return self.eval_period > 0 and self.num_done % self.eval_period == 0

    def evaluate(self) -> None:
        """Evaluate, process and write the results; every process must call this."""
        results = flatten_results_dict(self.evaluate_model() or {})
        self.trainer.storage.put_scalars(**results, smoothing_hint=False)
        comm.synchronize()  # evaluations take different times
        for hook in self.processing:
            hook.after_evaluation()
        self.is_pending = False
        for writer in self.writers:
            writer.write()
        if self.num_done in self.saved and self.num_done < self.trainer.max_iter:
            self.save()

    def stop_early(self) -> None:
        """Raise StopEarly, with the final checkpoint written, if a hook has decided so."""
        for sentence in filter(None, (hook.verdict() for hook in self.processing)):
            if not self.is_finished:
                self.is_finished = True
                self.save(FINAL)
            raise StopEarly(sentence)

    def save(self, name: str = "") -> None:
        """Write a checkpoint of the iterations done; every process must call this."""
        path = run_on_main_rank(lambda: self._save(name))
        self.saved = {self.num_done: path}  # on every process: what follows depends on it
        self.save_time = time.monotonic()

    def save_after_error(self) -> None:
        """Keep the iterations done since the last checkpoint, without waiting for other processes.

        Not if the weights are not finite, or were being updated.
        """
        is_new = self.num_done > self.trainer.start_iter and self.num_done not in self.saved
        if not comm.is_main_process() or not is_new or self.trainer.is_updating():
            return
        state = self.checkpointer.model.state_dict().values()
        if not all(v.isfinite().all() for v in state if v.is_floating_point()):
            logger.error("the weights are not finite: no checkpoint of them was written")
            return
        try:
            self.saved = {self.num_done: self._save("")}
        except InputError as error:
            logger.error(str(error))

    def _save(self, name: str) -> str:
        iteration = self.num_done - 1
        return self.checkpointer.save(name or f"model_{iteration:07d}", iteration=iteration)
