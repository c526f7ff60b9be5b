#!/usr/bin/env python
"""Kill trainings at random moments, resume them, and compare each with an undisturbed one.

    python dev/check_kills.py output/kills --kills 200 -- \
        --config-file configs/quick/dn_deformable.yaml --num-gpus 0 SOLVER.IMS_PER_BATCH 2

A chain is a training that is killed (SIGKILL) and resumed until it ends before the next kill, at
the latest after --longest kills. Half of the kills come at a random moment in the life of a
process, the others when a file is being written, in an evaluation or at the end. In the end all
files must exist, and all checkpoints must be equal to those of the undisturbed training, bit for
bit. Exact on the CPU.
With --processes 2 each training is one of torchrun, which is killed with all its processes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from check_resume import TRAIN_NET, are_equal, leaves, parse

ITERATIONS, LIMIT = 24, 300
SETTINGS = (
    f"SOLVER.MAX_ITER {ITERATIONS} SOLVER.CHECKPOINT_PERIOD 4 TEST.EVAL_PERIOD 4 LOG_PERIOD 1 "
    "TEST.BEST.METRIC bbox/AP TEST.EARLY_STOP.METRIC bbox/AP TEST.EARLY_STOP.PATIENCE 9 "
    "SOLVER.EMA.ENABLED True"
).split()
MOMENTS = ("any", "any", "any", "writing", "evaluating", "final")


def start(folder: Path, options: list[str], processes: int, *flags: str) -> subprocess.Popen:
    """Start train_net.py in a process group of its own."""
    runner = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(runner if processes > 1 else []), str(TRAIN_NET), *flags]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "printed.txt", "ab") as printed:
        return subprocess.Popen(
            [*command, *options, *SETTINGS, "OUTPUT_DIR", str(folder)],
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def is_moment(moment: str, folder: Path, log_start: int) -> bool:
    """Whether a process is at such a moment now."""
    if moment == "writing":
        return any(folder.glob("*.unfinished*"))
    log = folder / "log.txt"
    text = log.read_bytes()[log_start:] if log.exists() else b""
    if moment == "final":
        return b"model_final.pth" in text
    return text.rstrip().rpartition(b"\n")[2].find(b"Start inference") >= 0


def kill_at(moment: str, process: subprocess.Popen, folder: Path, seconds: float, rng) -> bool:
    """Kill the group of a process; False if it has ended before."""
    log = folder / "log.txt"
    log_start = log.stat().st_size if log.exists() else 0
    end = time.monotonic() + (rng.uniform(0.2, 0.9) * seconds if moment == "any" else LIMIT)
    seen, was = 0, False
    wanted = rng.randint(1, 3)  # the how manieth time the moment is seen
    while process.poll() is None and time.monotonic() < end:
        now = moment != "any" and is_moment(moment, folder, log_start)
        seen += now and not was
        was = now
        if seen >= (1 if moment == "final" else wanted):
            time.sleep(rng.uniform(0, 0.5 if moment == "final" else 0.02))
            break
        time.sleep(0.001)
    if process.poll() is not None:
        return False
    for pid in descendants(process.pid):  # torchrun gives each process a group of its own
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return True


def descendants(pid: int) -> list[int]:
    """Return a process and all that it has started, directly or not."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text()
            found += map(int, children.split())
    return found


def num_kills(counts: collections.Counter) -> int:
    return sum(counts[moment] for moment in set(MOMENTS))


def undisturbed(folder: Path, options: list[str], processes: int) -> float:
    """Train once; returns its seconds."""
    begin = time.monotonic()
    code = start(folder, options, processes).wait(timeout=LIMIT)
    if code:
        sys.exit(f"train_net.py ended with status {code}, see {folder / 'printed.txt'}")
    return time.monotonic() - begin


def differences(one: Path, other: Path) -> list[str]:
    """Say what differs between the files that two trainings have left."""
    names = [{p.name for p in f.glob("*.pth*")} | {"last_checkpoint"} for f in (one, other)]
    found = [f"{name} is in one only" for name in names[0] ^ names[1]]
    for name in sorted(names[0] & names[1]):
        paths = one / name, other / name
        if name == "last_checkpoint":
            equal = paths[0].read_text() == paths[1].read_text()
            found += [] if equal else [f"{name} differs"]
            continue
        first, second = (leaves(torch.load(path)) for path in paths)
        for key in sorted(first.keys() | second.keys()):
            is_path = key == "/detector/config"  # it holds the folder
            if not is_path and not are_equal(first.get(key), second.get(key)):
                found.append(f"{key} differs in {name}")
    return found


def chain(folder: Path, options, args, seconds: float, rng, counts) -> list[str]:
    """Train with kills and resumes to the end; returns differences from the undisturbed one."""
    for _ in range(min(args.longest, args.kills - num_kills(counts))):
        moment = rng.choice(MOMENTS)
        process = start(folder, options, args.processes, "--resume")
        if not kill_at(moment, process, folder, seconds, rng):
            break
        counts[moment] += 1
        counts["with an unfinished file"] += any(folder.glob("*.unfinished*"))
    code = start(folder, options, args.processes, "--resume").wait(timeout=LIMIT)
    if code:
        return [f"the resume ended with status {code}, see {folder / 'printed.txt'}"]
    return differences(args.output / "undisturbed", folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="of all chains together")
    parser.add_argument("--longest", type=int, default=8, help="kills of one chain, at most")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args, options = parse(parser)
    seconds = undisturbed(args.output / "undisturbed", options, args.processes)
    rng, counts, broken = random.Random(args.seed), collections.Counter(), 0
    number = 0
    while num_kills(counts) < args.kills:
        folder = args.output / f"chain_{number}"
        found = chain(folder, options, args, seconds, rng, counts)
        broken += bool(found)
        for line in found[:5]:
            print(f"chain {number}: {line}", flush=True)
        number += 1
    kills = num_kills(counts)
    print(f"{kills} kills ({dict(counts)}) in {number} chains, {broken} of them not equal")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
