"""What a training prints: a progress bar on a terminal, plain lines in the log."""

from __future__ import annotations

import datetime
import logging
import sys

import torch
from detectron2.utils.events import EventWriter, get_event_storage
from tqdm import tqdm

logger = logging.getLogger(__name__)

SHOWN = ("total_loss", "loss_match", "loss_denoise", "loss_encoder")
"""Losses on the console; metrics.json and TensorBoard hold every one."""


class ProgressWriter(EventWriter):
    """One line every time it is asked to write; on a terminal, a progress bar in its place.

    Losses are medians over the last 20 iterations.
    """

    WINDOW = 20

    def __init__(self, max_iter: int):
        self.max_iter = max_iter
        self.bar = None
        if sys.stdout.isatty():
            self.bar = tqdm(total=max_iter, file=sys.stdout, dynamic_ncols=True, unit="it")
            for handler in logging.getLogger("dn_detr").handlers:
                if getattr(handler, "stream", None) is sys.stdout:
                    handler.addFilter(lambda record: record.name != __name__)

    def write(self):
        storage = get_event_storage()
        if storage.iter >= self.max_iter:
            return
        histories = storage.histories()
        losses = {
            name: histories[name].median(storage.count_samples(name, self.WINDOW))
            for name in SHOWN
            if name in histories
        }
        parts = [f"{name}: {value:.4g}" for name, value in losses.items()]
        if "lr" in histories:
            parts.append(f"lr: {histories['lr'].latest():.3g}")
        if torch.cuda.is_available():
            parts.append(f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
        if self.bar is not None:
            self.bar.n = storage.iter + 1
            self.bar.set_postfix_str("  ".join(parts))
        if "time" in histories:
            seconds = histories["time"].median(100)
            remaining = int(seconds * (self.max_iter - storage.iter - 1))
            parts.append(f"time: {seconds:.3f}")
            parts.append(f"data_time: {histories['data_time'].median(100):.3f}")
            parts.append(f"eta: {datetime.timedelta(seconds=remaining)}")
            storage.put_scalar("eta_seconds", remaining, smoothing_hint=False)
        logger.info(f"iter {storage.iter + 1}/{self.max_iter}  " + "  ".join(parts))

    def close(self):
        if self.bar is not None:
            self.bar.close()
