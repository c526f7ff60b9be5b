#!/usr/bin/env python
"""Compare a killed and resumed training with an uninterrupted one, bit for bit.

    python dev/check_resume.py output/resume --iterations 30 --checkpoint 10 -- \
        --config-file configs/quick/dn_deformable.yaml --num-gpus 0 SOLVER.IMS_PER_BATCH 2

Trains twice for --iterations. The second run is killed (SIGKILL) some iterations after its
checkpoint and resumed. Arguments after "--" are passed to train_net.py. Compares every loss of
every iteration after the checkpoint, and the whole final checkpoint: weights, optimizer, and so on.
Exact on the CPU; on a GPU only with deterministic operators.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

TRAIN_NET = Path(__file__).resolve().parents[1] / "train_net.py"


def losses(folder: Path) -> list[tuple[int, dict[str, str]]]:
    """Yield (iteration, losses and metrics as text) in written order, without an unfinished line.

    As text, NaN equals NaN.
    """
    path = folder / "metrics.json"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [
        (
            line["iteration"],
            {key: str(value) for key, value in line.items() if "loss" in key or "/" in key},
        )
        for line in map(json.loads, lines)
        if "total_loss" in line
    ]


def train(folder: Path, options: list[str], settings: list[str], *, flags=(), kill_after=None):
    """Run train_net.py to the end, or kill it after iteration `kill_after`."""
    command = [sys.executable, str(TRAIN_NET), *flags, *options, *settings]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "printed.txt", "a") as printed:
        process = subprocess.Popen(
            [*command, "OUTPUT_DIR", str(folder)], stdout=printed, stderr=subprocess.STDOUT
        )
        while kill_after is not None and process.poll() is None:
            if any(iteration >= kill_after for iteration, _ in losses(folder)):
                process.kill()
            time.sleep(0.01)
        code = process.wait()
    if code != (0 if kill_after is None else -signal.SIGKILL):
        sys.exit(f"train_net.py ended with status {code}, see {folder / 'printed.txt'}")


def leaves(state, name: str = "") -> dict:
    """Return all values of a checkpoint (weights, optimizer, moving average, ...) by path."""
    if isinstance(state, dict):
        pairs = state.items()
    elif isinstance(state, list | tuple):
        pairs = enumerate(state)
    else:
        return {name: state}
    return {k: v for key, part in pairs for k, v in leaves(part, f"{name}/{key}").items()}


def are_equal(one, other) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Add and check `output`; return the arguments, and those of train_net.py behind "--"."""
    parser.add_argument("output", type=Path, help="an empty or new folder")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:cut])
    if args.output.exists() and any(args.output.iterdir()):
        sys.exit(f"{args.output} is not empty")
    return args, sys.argv[cut + 1 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--checkpoint", type=int, default=10, help="iterations between checkpoints")
    args, options = parse(parser)
    settings = [
        *("SOLVER.MAX_ITER", str(args.iterations), "LOG_PERIOD", "1"),
        *("SOLVER.CHECKPOINT_PERIOD", str(args.checkpoint)),
    ]
    whole, killed = args.output / "whole", args.output / "killed"
    train(whole, options, settings)
    train(killed, options, settings, kill_after=args.checkpoint + 1)
    if (killed / "model_final.pth").exists():
        sys.exit("the run ended before it was killed: increase --iterations")
    start = int((killed / "last_checkpoint").read_text()[len("model_") : -len(".pth")]) + 1
    train(killed, options, settings, flags=["--resume"])

    expected, pieces = dict(losses(whole)), losses(killed)
    if f"Starting training from iteration {start}\n" not in (killed / "log.txt").read_text():
        sys.exit(f"the second run did not resume from its checkpoint, at iteration {start}")
    if any(i <= before for (before, _), (i, _) in pairwise(pieces)):
        sys.exit("metrics.json has an iteration twice")
    resumed = dict(pieces)
    for iteration in range(start, args.iterations):
        for name, value in expected[iteration].items():
            if resumed[iteration][name] != value:
                sys.exit(
                    f"iteration {iteration}: {name} is {resumed[iteration][name]} after the resume "
                    f"and {value} without"
                )
    num_losses = len(expected[0])
    expected, resumed = (leaves(torch.load(f / "model_final.pth")) for f in (whole, killed))
    for name in sorted(expected.keys() | resumed.keys()):
        if name == "/detector/config":  # it holds the folder
            continue
        if not are_equal(expected.get(name), resumed.get(name)):
            sys.exit(f"{name} differs in the final checkpoint")
    print(
        f"equal bit for bit: {num_losses} losses in each of the iterations {start} to "
        f"{args.iterations - 1}, and {len(expected)} values of the final checkpoint"
    )


if __name__ == "__main__":
    main()
