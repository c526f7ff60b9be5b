"""Event writer for Weights & Biases."""

from __future__ import annotations

import importlib
from pathlib import Path

import yaml
from detectron2.utils.events import EventWriter, get_event_storage

from dn_detr.errors import InputError


class WandbWriter(EventWriter):
    """Log the scalars of metrics.json over an axis "iteration", and the configuration.

    OUTPUT_DIR/wandb_run.txt holds the run's id. Like metrics.json, the run continues whenever a
    training writes to that folder, even from an earlier iteration.
    """

    def __init__(self, cfg):
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise InputError("WANDB.ENABLED needs wandb: pip install wandb.") from error
        self.window = cfg.LOG_PERIOD
        self.written = -1
        folder = Path(cfg.OUTPUT_DIR)
        file = folder / "wandb_run.txt"
        self.run = wandb.init(
            project=cfg.WANDB.PROJECT,
            name=cfg.WANDB.NAME or folder.name,
            id=file.read_text().strip() if file.is_file() else None,
            resume="allow",
            dir=str(folder),
            config=yaml.safe_load(cfg.dump()),
        )
        file.write_text(self.run.id)
        self.run.define_metric("iteration")
        self.run.define_metric("*", step_metric="iteration")

    def write(self):
        storage = get_event_storage()
        new: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in storage.latest_with_smoothing_hint(self.window).items():
            if iteration > self.written:
                new.setdefault(iteration, {})[name] = value
        for iteration in sorted(new):
            self.run.log({"iteration": iteration, **new[iteration]})
        self.written = max([self.written, *new])

    def close(self):
        self.run.finish()
