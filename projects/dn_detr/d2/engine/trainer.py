"""Detectron2's DefaultTrainer with this project's data, optimizer, checkpoints and logging."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import weakref
from datetime import timedelta

import torch
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, TensorboardXWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dn_detr.d2.config.training_defaults import check_values
from dn_detr.d2.data.loader import build_test_loader, build_train_loader
from dn_detr.d2.engine.activation_checkpointing import recompute
from dn_detr.d2.engine.checkpoint import describe
from dn_detr.d2.engine.collective import raise_on_all_ranks, set_timeout
from dn_detr.d2.engine.compile import compile_core
from dn_detr.d2.engine.early_stopping import build_best
from dn_detr.d2.engine.ema import KEY as EMA
from dn_detr.d2.engine.ema import FollowWeights, MovingAverage
from dn_detr.d2.engine.endings import SIGNALS, Stopped, StopRequests, as_input_error
from dn_detr.d2.engine.event_storage import BoundedEventStorage
from dn_detr.d2.engine.instability_hook import build_instruments
from dn_detr.d2.engine.milestones import Milestones, StopEarly
from dn_detr.d2.engine.nonfinite_dump import NonFiniteDump
from dn_detr.d2.engine.run_checkpoint import RunCheckpointer, facts
from dn_detr.d2.engine.train_step import TrainStep
from dn_detr.d2.engine.wandb_writer import WandbWriter
from dn_detr.d2.engine.writers import FOR_FILE, MetricsFile, ProgressBar, ProgressLines
from dn_detr.d2.evaluation.coco_evaluator import Evaluator, build_evaluator
from dn_detr.d2.modeling.batch import num_parts
from dn_detr.d2.modeling.meta_arch import core_of
from dn_detr.d2.modeling.operator_checks import checked_operators
from dn_detr.d2.solver.lr_scheduler import build_lr_scheduler
from dn_detr.d2.solver.optimizer import build_optimizer
from dn_detr.errors import InputError, NotFinite

logger = logging.getLogger(__name__)

LONGEST_WINDOW = 100
"""Iterations of the longest median on the console."""


class Trainer(DefaultTrainer):
    """Train any configuration of dn_detr; a resumed run continues exactly where it stopped."""

    @staticmethod
    def auto_scale_workers(cfg, num_workers: int):
        """Scale everything that counts iterations, and learning rates, by the number of processes.

        Detectron2's own, and the keys of this project; see SOLVER.REFERENCE_WORLD_SIZE.
        """
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is cfg:
            return cfg
        factor = num_workers / cfg.SOLVER.REFERENCE_WORLD_SIZE
        is_frozen = scaled.is_frozen()
        scaled.defrost()
        solver = scaled.SOLVER
        solver.BASE_LR_END *= factor
        solver.FLAT_ITERS, solver.FINAL_ITERS, solver.EMA.WARMUP = (
            round(count / factor)
            for count in (solver.FLAT_ITERS, solver.FINAL_ITERS, solver.EMA.WARMUP)
        )
        solver.KEEP_EVERY = round(solver.KEEP_EVERY / factor)
        scaled.INPUT.SCHEDULE = [round(iteration / factor) for iteration in scaled.INPUT.SCHEDULE]
        if is_frozen:
            scaled.freeze()
        return scaled

    def __init__(self, cfg):
        # DefaultTrainer's constructor is not called: its steps need CUDA for mixed precision and
        # synchronise at every loss, and its processes need a GPU each.
        TrainerBase.__init__(self)
        check_values(cfg)
        set_timeout(timedelta(minutes=cfg.PROCESS_TIMEOUT))
        self.draws_seed = cfg.SEED < 0
        cfg = with_drawn_seed(self.auto_scale_workers(cfg, comm.get_world_size()))
        if cfg.DETERMINISTIC:
            use_deterministic_algorithms()
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        loader = self.build_train_loader(cfg)
        ema = cfg.SOLVER.EMA
        self.average = (
            MovingAverage(model, decay=ema.DECAY, warmup=ema.WARMUP) if ema.ENABLED else None
        )
        recompute(model, cfg.MODEL.DN_DETR.RECOMPUTE)
        if cfg.MODEL.DN_DETR.COMPILE:
            compile_core(core_of(model, "MODEL.DN_DETR.COMPILE"), cfg.MODEL.DN_DETR.COMPILE)
        model = across_processes(model)
        self._trainer = TrainStep(
            model,
            loader,
            optimizer,
            precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else None,
            seed=loader.seed,
            num_parts=num_parts(cfg),
            evidence=NonFiniteDump(cfg.OUTPUT_DIR, cfg.dump()),
            requests=self.requests,
        )
        self.checkpointer = RunCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            run=facts(cfg),
            keep_newest=cfg.SOLVER.KEEP_NEWEST,
            keep_every=cfg.SOLVER.KEEP_EVERY,
            draws_seed=self.draws_seed,
            detector=describe(cfg),
            may_be_new=cfg.MODEL.DN_DETR.NEW_PARAMETERS,
            trainer=weakref.proxy(self),
            **({EMA: self.average} if self.average else {}),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.stop = StopRequests()
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """Build Detectron2's hooks, with `Milestones` for its checkpoints and evaluations."""
        cfg, is_main = self.cfg, comm.is_main_process()
        writers = raise_on_all_ranks(lambda: self.build_writers() if is_main else [])
        model = without_wrapper(self.model)
        instruments = build_instruments(cfg, model)
        if instruments:
            core_of(model, "TEST.INSTABILITY")
        processing = [*([instruments] if instruments else []), *build_best(cfg, self.checkpointer)]
        self.milestones = Milestones(
            self.checkpointer,
            self.evaluate,
            processing,
            writers,
            eval_period=cfg.TEST.EVAL_PERIOD,
            save_period=cfg.SOLVER.CHECKPOINT_PERIOD,
            save_minutes=cfg.SOLVER.CHECKPOINT_MINUTES,
        )
        return [
            ProgressBar() if is_main and sys.stdout.isatty() else None,
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            FollowWeights(self.average, model) if self.average else None,
            self.build_precise_bn(),
            *processing,
            self.milestones,
            hooks.PeriodicWriter(writers, cfg.LOG_PERIOD) if is_main else None,
        ]

    def evaluate(self) -> dict:
        """Evaluate the weights and their moving average.

        Returns:
            The metrics, with those of the moving average under "ema", whose files are written to
            the folder "ema" of OUTPUT_DIR.
        """
        models = [without_wrapper(self.model), *([self.average.model] if self.average else [])]
        handles = [model.register_forward_pre_hook(self._leave_if_asked) for model in models]
        try:
            results = self._evaluate()
        finally:
            for handle in handles:
                handle.remove()
        self._last_eval_results = results
        return results

    def _leave_if_asked(self, *_forward) -> None:
        """Raise Stopped in an evaluation; several processes could not leave it together."""
        if self.stop.signum is not None and comm.get_world_size() == 1:
            raise Stopped(self.stop.signum)

    def _evaluate(self) -> dict:
        results = self.test(self.cfg, self.model)
        if self.average:
            cfg = self.cfg.clone()
            cfg.defrost()
            cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, EMA)
            logger.info("evaluating the moving average of the weights")
            averaged = self.test(cfg, self.average.model)
            results = {**results, EMA: averaged} if results else results
        return results

    def build_precise_bn(self) -> HookBase | None:
        """Build Detectron2's hook of TEST.PRECISE_BN if it is enabled and the model has norms."""
        test = self.cfg.TEST
        if not test.PRECISE_BN.ENABLED or not get_bn_modules(self.model):
            return None
        loader = self.build_train_loader(self.cfg)
        return hooks.PreciseBN(test.EVAL_PERIOD, self.model, loader, test.PRECISE_BN.NUM_ITER)

    def build_writers(self) -> list[EventWriter]:
        """Build the writers of the console, metrics.json, TensorBoard and Weights & Biases."""
        output, period = self.cfg.OUTPUT_DIR, self.cfg.LOG_PERIOD
        wandb = [WandbWriter(self.cfg)] if self.cfg.WANDB.ENABLED else []  # fails without wandb
        return [
            ProgressLines(self.max_iter, period),
            MetricsFile(os.path.join(output, "metrics.json"), period),
            TensorboardXWriter(output, period),
            *wandb,
        ]

    def resume_or_load(self, resume: bool = True) -> None:
        step = self._trainer
        configured = [dict(group) for group in self.optimizer.param_groups]
        base_rates = self.scheduler.base_lrs
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resumed:
            self.start_iter = self.iter + 1
            if self.start_iter > self.max_iter:
                raise InputError(
                    f"{self.checkpointer.resumed!r} has done {self.start_iter} iterations, more "
                    f"than SOLVER.MAX_ITER {self.max_iter}: raise it to train on."
                )
            # The checkpoint has the rates of its own configuration.
            self.scheduler.base_lrs = base_rates
            rates = self.scheduler.get_lr()
            for group, new, lr in zip(self.optimizer.param_groups, configured, rates, strict=True):
                group.update({**new, "params": group["params"], "lr": lr})
        step.data_loader.set_start_iteration(self.start_iter)
        if self.draws_seed and step.saved_seed is not None:
            model = without_wrapper(self.model)
            step.seed = step.data_loader.seed = model.seed = step.saved_seed
            logger.info(
                f"continuing with the seed {step.seed} that was drawn when this training began"
            )

    def state_dict(self) -> dict:
        # Iterations whose hooks have run: not one that failed.
        return {
            **super().state_dict(),
            "iteration": max(self.milestones.num_done - 1, 0),
            "parameters": self.parameter_names(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up a training, whose parameters may have been in other groups of the optimizer.

        Raises:
            ValueError: If its iteration or the optimizer's tensors cannot be those of a training.
        """
        number, step = state_dict["iteration"], state_dict["_trainer"]
        if type(number) is not int or number < 0:
            raise ValueError(f"its iteration is {number!r}")
        states = step["optimizer"]["state"]
        known = {x: states[i] for i, x in enumerate(state_dict["parameters"]) if i in states}
        ours = enumerate(self.parameter_names())
        optimizer = {
            "state": {i: known[name] for i, name in ours if name in known},
            "param_groups": self.optimizer.state_dict()["param_groups"],
        }
        super().load_state_dict({**state_dict, "_trainer": {**step, "optimizer": optimizer}})
        for p, state in self.optimizer.state.items():
            for key, value in state.items():
                shape = () if key == "step" else p.shape
                if value is not None and value.shape != shape:
                    raise ValueError(f"{key} must have the shape {shape}, got {value.shape}")
                # The fused step writes as many values as p has, also where strides overlap.
                state[key] = None if value is None else value.clone()

    def parameter_names(self) -> list[str]:
        """Return the names of what is trained, in the order of the optimizer's groups."""
        names = {p: name for name, p in without_wrapper(self.model).named_parameters()}
        return [names[p] for group in self.optimizer.param_groups for p in group["params"]]

    def requests(self) -> list[float]:
        """Return what this process asks of all: to stop, by signal, and to save."""
        is_due = comm.is_main_process() and self.milestones.is_minute_due()
        return [*self.stop.flags(), float(is_due)]

    def asked(self) -> list[float]:
        """Return the sum of all processes' `requests`, in an iteration known to all."""
        return self.requests() if comm.get_world_size() == 1 else self._trainer.asked

    def is_save_due(self) -> bool:
        """Whether SOLVER.CHECKPOINT_MINUTES have passed on the main process."""
        return self.asked()[-1] > 0

    def is_updating(self) -> bool:
        """Whether an update of the weights has begun whose hooks have not all run."""
        return self._trainer.last_update >= self.milestones.num_done

    def stop_if_asked(self) -> None:
        """Save and raise Stopped if a signal asks for it; every process must call this."""
        for signum, number in zip(SIGNALS, self.asked(), strict=False):
            if number:
                if self.milestones.num_done not in self.milestones.saved:
                    self.milestones.save()
                raise Stopped(signum)

    def train(self):
        """Train from `start_iter` to `max_iter`.

        Whatever ends it earlier leaves a checkpoint of the iterations done, if it can.

        Raises:
            Stopped: After a signal.
            InputError: With one sentence for what the user can mend.
        """
        if self.milestones.is_finished and self.start_iter >= self.max_iter:
            logger.info(f"{self.checkpointer.resumed} is the end: raise SOLVER.MAX_ITER to go on")
            return None
        logger.info(f"Starting training from iteration {self.start_iter}")
        window = max(self.cfg.LOG_PERIOD, LONGEST_WINDOW)
        try:
            with self.stop, BoundedEventStorage(self.start_iter, window) as self.storage:
                self.loop()
            if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
                verify_results(self.cfg, self._last_eval_results)
        except StopEarly as stop:
            logger.info(str(stop))
        except Exception as error:
            known = as_input_error(error, self.cfg.PROCESS_TIMEOUT)
            signum = error.signum if isinstance(error, Stopped) else self.stop.signum
            if signum is not None and not isinstance(known, InputError):
                raise Stopped(signum, self.stopped_sentence(signum)) from error
            if not isinstance(known, InputError):
                logger.exception("the training failed:")
            elif isinstance(known, NotFinite):
                logger.error(str(known))
            if known is error:
                raise
            raise known from error
        return getattr(self, "_last_eval_results", None)

    def loop(self) -> None:
        """Run the hooks and iterations, as Detectron2's loop."""
        self.iter = self.start_iter
        try:
            self.before_train()
            while self.iter < self.max_iter:
                self.before_step()
                self.run_step()
                self.after_step()
                self.stop_if_asked()
                self.iter += 1
        except StopEarly:
            raise
        except Exception:
            self.milestones.save_after_error()
            raise
        finally:
            self._trainer._data_loader_iter_obj = None  # ends its workers at once
            self.after_train()

    def stopped_sentence(self, signum: int) -> str:
        """Say what ended the training and what is left of it."""
        name, done = signal.Signals(signum).name, self.milestones.num_done
        saved = self.milestones.saved.get(done)
        left = f"saved in {saved}; --resume continues there" if saved else "nothing was saved"
        return f"stopped by {name} after {done} of {self.max_iter} iterations: {left}."

    @classmethod
    def build_model(cls, cfg) -> nn.Module:
        try:
            with checked_operators(cfg):
                model = build_model(cfg)
        except (ValueError, KeyError, AssertionError) as error:
            raise InputError(
                f"the model cannot be built from this configuration: {reason_of(error)}."
            ) from error
        logger.info(f"Model:\n{model}", **FOR_FILE)
        return model

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name: str):
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name: str) -> Evaluator:
        return build_evaluator(cfg, dataset_name)


def reason_of(error: Exception) -> str:
    """The message of an error on one line, without full stop; of a bare assertion its source."""
    if not isinstance(error, AssertionError) or " " in str(error):
        return " ".join(str(error.args[0] if error.args else error).split()).rstrip(".")
    return traceback.extract_tb(error.__traceback__)[-1].line


def across_processes(model: nn.Module) -> nn.Module:
    """Wrap the model in DistributedDataParallel if there are several processes.

    Every parameter gets a gradient from every batch, so find_unused_parameters is off.
    """
    device = next(model.parameters()).device
    device_ids = [device] if device.type == "cuda" else None
    return create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)


def with_drawn_seed(cfg):
    """Return the configuration with a SEED that all processes share; a negative one is drawn."""
    if cfg.SEED >= 0:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = comm.shared_random_seed()
    cfg.freeze()
    return cfg


def use_deterministic_algorithms() -> None:
    """Turn on PyTorch's deterministic algorithms, including cuBLAS and cuDNN."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def without_wrapper(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model
