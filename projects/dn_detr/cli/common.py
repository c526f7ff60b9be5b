"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAGS = {
    "data": "DATASETS.FOLDER",
    "weights": "MODEL.WEIGHTS",
    "output": "OUTPUT_DIR",
    "epochs": "SOLVER.EPOCHS",
    "batch": "SOLVER.IMS_PER_BATCH",
    "workers": "DATALOADER.NUM_WORKERS",
}
"""Options that are another name of a configuration key."""


def at_least(least: float, kind: type = int) -> Callable[[str], Any]:
    """Return a type of argparse: a number that is not smaller."""

    def number(text: str) -> Any:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    number.__name__ = kind.__name__  # what argparse calls it in an error
    return number


def share(text: str) -> float:
    """Read a number in [0, 1], a type of argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], got {text}")
    return value


def picture(text: str) -> Path:
    """Read the name of a picture, a type of argparse; .png is added if it has no suffix."""
    path = Path(text)
    return path if path.suffix else path.with_suffix(".png")


def height_and_width(text: str) -> tuple[int, int]:
    """Read 800x1333, a type of argparse."""
    height, width = text.split("x")
    return int(height), int(width)


def add_config(parser: argparse.ArgumentParser, about: str) -> None:
    """Add the positional argument of a configuration, and accept keys of it on the line."""
    parser.add_argument("config", nargs="?", metavar="CONFIG", help=about)
    parser.set_defaults(opts=())


def add_detector(parser: argparse.ArgumentParser) -> None:
    """Add what loads a trained detector: `detector_of`."""
    parser.add_argument("--weights", required=True, metavar="FILE", help="trained checkpoint")
    parser.add_argument("--config", metavar="CONFIG", help="for checkpoints without configuration")
    parser.set_defaults(opts=())


def pairs_of(args: argparse.Namespace, *flags: str) -> list[str]:
    """Return the configuration keys of a command line, those of these `FLAGS` first."""
    given = ((FLAGS[name], getattr(args, name)) for name in flags)
    return [str(x) for pair in given if pair[1] is not None for x in pair] + list(args.opts)


def detector_of(args: argparse.Namespace, threshold: float = 0.3) -> Any:
    """Load the `Detector` that a command line names."""
    from dn_detr.detector import Detector

    return Detector(args.weights, config_file=args.config, opts=args.opts, threshold=threshold)
