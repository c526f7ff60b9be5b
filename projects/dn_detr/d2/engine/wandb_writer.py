"""Weights & Biases beside metrics.json and TensorBoard."""

from __future__ import annotations

import importlib
from pathlib import Path

import yaml
from detectron2.utils.events import EventWriter, get_event_storage

from dn_detr.errors import InputError


class WandbWriter(EventWriter):
    """Sends what metrics.json gets, over an axis "iteration", and the configuration.

    The run's id stands in OUTPUT_DIR/wandb_run.txt: like metrics.json, the run is continued whenever a
    training writes into that folder, also from an earlier iteration on.
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
        news: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in storage.latest_with_smoothing_hint(self.window).items():
            if iteration > self.written:
                news.setdefault(iteration, {})[name] = value
        for iteration in sorted(news):
            self.run.log({"iteration": iteration, **news[iteration]})
        self.written = max([self.written, *news])

    def close(self):
        self.run.finish()
