"""Detectron2's DefaultTrainer with this project's data, optimizer, checkpoints and printing."""

from __future__ import annotations

import os
import weakref

from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.events import JSONWriter, TensorboardXWriter

from dn_detr.d2.checkpoint import Checkpointer
from dn_detr.d2.loader import build_test_loader, build_train_loader
from dn_detr.d2.optimizer import build_optimizer
from dn_detr.d2.train_step import TrainStep
from dn_detr.d2.writers import ProgressWriter


class Trainer(DefaultTrainer):
    """Trains any configuration of dn_detr; resuming continues exactly where the run stopped."""

    def build_hooks(self) -> list:
        # Called last in Detectron2's constructor, before the hooks take hold of the checkpointer.
        # Its own steps need CUDA for mixed precision and wait for the device at each loss.
        cfg, step = self.cfg, self._trainer
        self._trainer = TrainStep(
            step.model,
            step.data_loader,
            step.optimizer,
            precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else None,
            seed=cfg.SEED,
        )
        self.checkpointer = Checkpointer(step.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        return super().build_hooks()

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        self._trainer.data_loader.set_start_iteration(self.start_iter)

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name: str):
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))

    def build_writers(self) -> list:
        output = self.cfg.OUTPUT_DIR
        return [
            ProgressWriter(self.max_iter),
            JSONWriter(os.path.join(output, "metrics.json")),
            TensorboardXWriter(output),
        ]
