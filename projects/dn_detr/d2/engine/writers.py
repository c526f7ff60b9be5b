"""What a training writes: progress bar, lines on the screen and in log.txt, metrics.json."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter, get_event_storage
from tqdm import tqdm

from dn_detr.datasets.cache import replacing

logger = logging.getLogger(__name__)

SHOWN = (
    "total_loss",
    "loss_match",
    "loss_dn",
    "loss_group",
    "loss_hybrid",
    "loss_enc",
)
"""Losses on the console; metrics.json and TensorBoard have all."""

LOGGERS = ("detectron2", "fvcore", "dn_detr")
"""Loggers that are connected to the screen and to log.txt."""

FOR_FILE = {"extra": {"is_for_file": True}}
"""Arguments of a logging call whose text is not for the screen, because it is long."""

_COLOUR = re.compile(r"\x1b\[[\d;]*m")


class _Lines(logging.Formatter):
    """Lines with time and source, without the colours that libraries put into messages."""

    def __init__(self):
        super().__init__("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return _COLOUR.sub("", super().format(record))


def open_log(folder: str, rank: int) -> Callable[[], None]:
    """Connect the loggers to log.txt in a folder and, on the main rank, to the screen.

    Returns:
        A function that ends this.
    """
    name = f"log.txt{f'.rank{rank}' if rank else ''}"
    file = logging.FileHandler(os.path.join(folder, name), encoding="utf-8")
    screen = logging.StreamHandler(sys.stdout)
    screen.addFilter(lambda record: not getattr(record, "is_for_file", False))
    handlers = [file] if rank else [screen, file]
    for handler in handlers:
        handler.setFormatter(_Lines())
    for logger in map(logging.getLogger, LOGGERS):
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.handlers = [*handlers]

    def close() -> None:
        for logger in map(logging.getLogger, LOGGERS):
            logger.propagate = True
            logger.handlers = [h for h in logger.handlers if h not in handlers]
        file.close()

    return close


@contextlib.contextmanager
def held_back(logger: logging.Logger) -> Iterator[Callable[[], None]]:
    """Hold back what a logger says until the function that this gives is called, or the end."""
    records: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    def release() -> None:
        logger.removeFilter(hold)
        while records:
            logger.handle(records.pop(0))

    logger.addFilter(hold)
    try:
        yield release
    finally:
        release()


def summary(storage: EventStorage, window: int) -> list[str]:
    """Format median losses of the last `window` iterations, learning rate and GPU memory."""
    histories = storage.histories()
    parts = [
        f"{name}: {histories[name].median(storage.count_samples(name, window)):.4g}"
        for name in SHOWN
        if name in histories
    ]
    if "lr" in histories:
        parts.append(f"lr: {histories['lr'].latest():.3g}")
    if torch.cuda.is_available():
        parts.append(f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
    return parts


class ProgressLines(EventWriter):
    """Log one line per write; losses are medians over `window` iterations."""

    def __init__(self, max_iter: int, window: int):
        self.max_iter = max_iter
        self.window = window
        self.written = -1

    def write(self):
        storage = get_event_storage()
        # The extra calls after an evaluation and after the last iteration
        if storage.iter in (self.written, self.max_iter):
            return
        self.written = storage.iter
        parts, histories = summary(storage, self.window), storage.histories()
        if "time" in histories:
            seconds = histories["time"].median(100)
            remaining = int(seconds * (self.max_iter - storage.iter - 1))
            parts.append(f"time: {seconds:.3f}")
            parts.append(f"data_time: {histories['data_time'].median(100):.3f}")
            parts.append(f"eta: {datetime.timedelta(seconds=remaining)}")
            storage.put_scalar("eta_seconds", remaining, smoothing_hint=False)
        logger.info(f"iter {storage.iter + 1}/{self.max_iter}  " + "  ".join(parts))


class MetricsFile(JSONWriter):
    """Detectron2's metrics.json, in which a resumed training has each iteration once."""

    def __init__(self, path: str, window: int):
        super().__init__(path, window)
        self.path = Path(path)
        self.window = window

    def begin_at(self, iteration: int, evaluation: int) -> None:
        """Remove what a killed process has written of iterations that are to come, and half lines.

        Args:
            iteration: First iteration to come.
            evaluation: First iteration whose evaluation is to come.
        """
        kept, lines = [], self.path.read_text(errors="replace").splitlines()
        for line in lines:
            try:
                row = json.loads(line)
                number = row.pop("iteration")
                row = {
                    k: v for k, v in row.items() if number < (evaluation if "/" in k else iteration)
                }
            except (ValueError, TypeError, AttributeError, LookupError):
                continue
            kept += [json.dumps({**row, "iteration": number}, sort_keys=True)] if row else []
        if kept != lines:
            self.close()
            with replacing(self.path) as file:
                file.write("".join(f"{line}\n" for line in kept).encode())
            super().__init__(str(self.path), self.window)


class ProgressBar(HookBase):
    """A bar at the bottom of the terminal; the log scrolls above it, without progress lines."""

    WINDOW = 20

    def before_train(self):
        self.stream = sys.stdout
        columns, rows = shutil.get_terminal_size()  # never 0, unlike some terminals report
        self.bar = tqdm(
            total=self.trainer.max_iter,
            initial=self.trainer.start_iter,
            file=self.stream,
            ncols=columns,
            nrows=rows,
            unit="it",
        )
        self.handlers = [
            handler
            for name in LOGGERS
            for handler in logging.getLogger(name).handlers
            if getattr(handler, "stream", None) is self.stream
        ]
        for handler in self.handlers:
            handler.setStream(_AboveBar(self.stream))
            handler.addFilter(_is_no_progress_line)

    def after_step(self):
        parts = summary(self.trainer.storage, self.WINDOW)
        self.bar.set_postfix_str("  ".join(parts), refresh=False)
        self.bar.update()

    def after_train(self):
        self.bar.close()
        for handler in self.handlers:
            handler.setStream(self.stream)
            handler.removeFilter(_is_no_progress_line)


class _AboveBar:
    """A stream that writes above the bars of tqdm."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> None:
        tqdm.write(text, file=self.stream, end="")

    def flush(self) -> None:
        self.stream.flush()


def _is_no_progress_line(record: logging.LogRecord) -> bool:
    return record.name != __name__
