"""The table of commands, and what all of them share: their line is parsed, errors are sentences.

Modules of commands import torch and Detectron2 when they run, so that --help takes no time.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from importlib import import_module

import dn_detr

COMMANDS = {
    "train": "train a detector on a dataset",
    "eval": "AP of trained weights, or of a file of results, with a report",
    "predict": "detect in images and videos: pictures, json, csv, YOLO",
    "export": "write a file that runs without this project (ONNX, torch.export)",
    "check": "what is in a dataset, and what is wrong with it",
    "convert": "weights of other projects, and datasets of other formats",
    "weights": "published weights of these methods: list, download, convert",
    "split": "divide a dataset into training and validation",
    "plot": "losses and AP of trainings",
    "info": "what is installed; sizes of configurations; what weights hold",
    "visualize": "draw detections, decoder layers, training data, denoising",
    "benchmark": "time of training, inference, data loading or an exported file",
}
"""Command -> its line in the help; the module is dn_detr.cli.<command>."""

NODES = ("MODEL", "SOLVER", "INPUT", "TEST", "DATASETS", "DATALOADER", "WANDB", "GLOBAL")
KEYS = (
    *("OUTPUT_DIR", "SEED", "LOG_PERIOD", "DETERMINISTIC", "PROCESS_TIMEOUT", "VIS_PERIOD"),
    *("CUDNN_BENCHMARK", "FLOAT32_PRECISION", "VERSION"),
)
"""Nodes and keys at the top of a configuration."""

_KEY = re.compile(r"([A-Z][A-Z0-9_]+)((?:\.[A-Z][A-Z0-9_]*)*)")

USAGE = f"""usage: dn-detr COMMAND [options] [KEY VALUE | KEY=VALUE ...]

Denoising training for DETR-like detectors (dn_detr {dn_detr.__version__}).

{{commands}}

`dn-detr COMMAND --help` explains a command. Everywhere:
  --data FOLDER   a dataset folder: COCO, YOLO or Pascal VOC, in any layout
  --weights FILE  a checkpoint
  --output PATH   what is written
  dn_deformable, quick/dn_deformable, mine.yaml  a configuration, by name or path
  SOLVER.BASE_LR 1e-4, SEED=3                    a key of the configuration, anywhere"""


def is_key(word: str) -> bool:
    """Whether a word of the command line is a configuration key, perhaps a mistyped one."""
    match = _KEY.fullmatch(word)
    if match is None or os.path.exists(word):
        return False
    first, rest = match.groups()
    return bool(difflib.get_close_matches(first, NODES if rest else KEYS, n=1, cutoff=0.8))


def split_keys(words: list[str]) -> tuple[list[str], list[str]]:
    """Separate KEY VALUE and KEY=VALUE from the other words of a command line.

    Returns:
        The other words, and the pairs as KEY, VALUE, ...

    Raises:
        ValueError: for a key without a value.
    """
    others, pairs = [], []
    rest = iter(words)
    for word in rest:
        key, equals, value = word.partition("=")
        if not is_key(key):
            others.append(word)
            continue
        try:
            pairs += [key, value if equals else next(rest)]
        except StopIteration:
            raise ValueError(f"the key {key} needs a value: {key}=VALUE") from None
    return others, pairs


def parse(words: list[str]) -> argparse.Namespace:
    """Parse a command line without the program's name.

    Returns:
        The arguments of the command, "run", and "opts" if it takes keys of a configuration.
    """
    if not words or words[0] in ("-h", "--help"):
        table = "\n".join(f"  {name:<11} {text}" for name, text in COMMANDS.items())
        print(USAGE.format(commands=table))
        sys.exit(0)
    if words[0] == "--version":
        print(dn_detr.__version__)
        sys.exit(0)
    if words[0] not in COMMANDS:
        similar = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {similar[0]!r}?" if similar else f"one of {', '.join(COMMANDS)}."
        print(f"dn-detr: there is no command {words[0]!r}: {hint}", file=sys.stderr)
        sys.exit(2)
    module = import_module(f"dn_detr.cli.{words[0]}")
    parser = argparse.ArgumentParser(
        prog=f"dn-detr {words[0]}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=module.run, command=words[0])
    module.add_arguments(parser)
    words = words[1:]
    if parser.get_default("opts") is not None:
        try:
            words, pairs = split_keys(words)
        except ValueError as error:
            parser.error(str(error))
        parser.set_defaults(opts=pairs)
    has_parts = any(isinstance(a, argparse._SubParsersAction) for a in parser._actions)
    return parser.parse_args(words) if has_parts else parser.parse_intermixed_args(words)


def main(words: list[str] | None = None) -> None:
    """Run a command line, that of the process by default."""
    args = parse(sys.argv[1:] if words is None else words)
    program = f"dn-detr {args.command}"
    try:
        from dn_detr.d2.engine import launch
    except ImportError as error:
        hint = "run `pip install torch torchvision`" if error.name == "torch" else ""
        sys.exit(f"{program}: {error}{hint and f': {hint}'}.")
    except KeyboardInterrupt:  # there is nothing to save yet
        sys.exit(130)

    def call() -> None:
        faults = launch.invoke(args.run, args, program)
        if isinstance(faults, list) and faults:
            sys.exit("\n".join(f"{program}: {fault}" for fault in faults))

    launch.leave_after(call) if launch.is_torchrun() else call()
