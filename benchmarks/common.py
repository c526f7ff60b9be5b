"""Shared by the benchmarks: interleaved timing, machine description, tables, JSON results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dn_detr.ops.extension import read_record

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MIN_ROUNDS, MAX_ROUNDS = 3, 200
SLOW_MS = 1000.0
"""What takes longer is no different the first time."""


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test that it runs")
    parser.add_argument(
        "--seconds", type=float, help="time for each comparison (at least 3 rounds)"
    )
    parser.add_argument(
        "--save", nargs="?", const="", metavar="FILE",
        help="write to FILE, by default benchmarks/results/<device>.json",
    )  # fmt: skip
    return parser


# ----------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median and quartiles of `rounds` runs."""

    ms: float
    low_ms: float
    high_ms: float
    rounds: int


Prepare = Callable[[], Callable[[], object]]
"""Does what is not measured, and returns what is."""


def time_side_by_side(
    candidates: Mapping[str, Prepare], device: str, seconds: float, *, busy_only: bool = False
) -> dict[str, Timing]:
    """Time the candidates alternately, so that ratios come from the same run.

    Each candidate has a warm-up, which is counted if it takes long. Fast candidates run several
    times per round. On CUDA the wall time from launch to end; busy_only: device time only, with all
    launches queued in advance (for candidates that do not synchronize).
    """
    clock = _device_ms if device == "cuda" and busy_only else _wall_ms
    if device == "cuda":
        for prepare in candidates.values():  # compiles kernels, fills the allocator's pools
            prepare()()
    first = {name: clock(prepare, device) for name, prepare in candidates.items()}
    # On CUDA what takes less than 7 ms runs 17 times a round: at least 51 times in all.
    most, budget = (17, 120) if device == "cuda" else (20, 20)
    matches_per_object = {name: max(1, min(most, int(budget / ms))) for name, ms in first.items()}
    samples = {name: [ms] if ms > SLOW_MS else [] for name, ms in first.items()}
    start, rounds = time.perf_counter(), 0
    while rounds < MAX_ROUNDS:
        if rounds >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name, prepare in candidates.items():
            if rounds > 0 or not samples[name]:
                samples[name] += [clock(prepare, device) for _ in range(matches_per_object[name])]
        rounds += 1
    return {name: _summarize(times) for name, times in samples.items()}


def _summarize(times: list[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(ms=median, low_ms=low, high_ms=high, rounds=len(times))


def _wall_ms(prepare: Prepare, device: str) -> float:
    run = prepare()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _device_ms(prepare: Prepare, _device: str) -> float:
    run = prepare()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host queues the launches
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def count_launches(run: Callable[[], object]) -> dict[str, int]:
    """Count kernels and copies that `run` launches on the CUDA device, and synchronizations."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
    on_device = torch.autograd.DeviceType.CUDA
    events = [event for event in profiler.events() if not event.is_user_annotation]
    started = [event.name for event in events if event.device_type == on_device]
    waits = [event.name for event in events if re.fullmatch(r"cuda\w+Synchronize", event.name)]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in started)
    # PyTorch waits for streams and events; it is the profiler that waits for the whole device.
    waits = [name for name in waits if name != "cudaDeviceSynchronize"]
    return {"kernels": len(started) - copies, "copies": copies, "waits": len(waits)}


def copy_bandwidth(device: str, megabytes: int = 256) -> float:
    """Measure GB/s (read and written) of copying a tensor: the practical memory bandwidth."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    copy = {"copy": lambda: lambda: target.copy_(source)}
    timing = time_side_by_side(copy, device, seconds=0.2, busy_only=True)["copy"]
    return 2 * source.numel() * 4 / (timing.ms * 1e6)


# -------------------------------------------------------------------------------------- equality


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of the expected value; infinite for NaN."""
    difference = (got.detach().double() - expected.double()).norm()
    error = (difference / expected.double().norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


# --------------------------------------------------------------------------------------- results


def describe_machine(device: str) -> dict[str, str | int | None]:
    """Describe hardware and software of a measurement."""
    record = read_record() or {}
    facts = {
        "device": device_name(device),
        "cpu": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": record.get("compiler"),
        "nvcc": record.get("nvcc"),
        "architectures": record.get("architectures"),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["memory_gib"] = round(properties.total_memory / 2**30)
        facts["multiprocessors"] = properties.multi_processor_count
    return facts


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(0) if device == "cuda" else _cpu_name()


def _command() -> str:
    """Command line without --save."""
    path = Path(sys.argv[0]).resolve()
    script = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return re.sub(r" --save( [^-]\S*)?", "", " ".join(["python", script, *sys.argv[1:]]))


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return f"{name.group(1).strip() if name else platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str | None:
    """Short commit hash, with "+" if files other than results changed; else DN_DETR_COMMIT."""

    def git(*arguments):
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DN_DETR_COMMIT")


def default_file(device: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS / f"{slug}.json"


def save(
    args: argparse.Namespace, section: str, rows: Sequence[dict], keys: Sequence[str], **facts
) -> None:
    """Write `rows` to `section` of the results file, if --save is given.

    Other rows of the same day, commit and machine are kept, so that a long comparison can be run in
    parts. keys: columns that identify a row, together with "who".
    """
    if args.save is None:
        return
    path = Path(args.save) if args.save else default_file(args.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.is_file() else {}
    machine = describe_machine(args.device)
    before = content.get(section, {"machine": None})
    commands, kept = [_command()], []
    if before["machine"] == machine:
        new = {tuple(row[key] for key in (*keys, "who")) for row in rows}
        kept = [r for r in before["rows"] if tuple(r[key] for key in (*keys, "who")) not in new]
        commands = list(dict.fromkeys(before["commands"] + commands))
    content[section] = {
        "machine": machine, "commands": commands, **facts, "keys": list(keys),
        "rows": kept + list(rows),
    }  # fmt: skip
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwrote {section} to {path}")


def table(rows: Sequence[dict], keys: Sequence[str], against: str) -> str:
    """Return a Markdown table: a row per combination of `keys`, a column per "who".

    Values are milliseconds or MiB, with the factor to `against`.
    """
    people = list(dict.fromkeys(row["who"] for row in rows))
    lines: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        lines.setdefault(tuple(row[key] for key in keys), {})[row["who"]] = row
    body = []
    for values, cells in lines.items():
        base = _number(cells.get(against, {}))
        body.append([*map(str, values), *(_cell(cells.get(who), base) for who in people)])
    return markdown([*keys, *people], body)


def _cell(row: dict | None, base: float | None) -> str:
    if row is None:
        return ""
    number = _number(row)
    if number is None:
        return row["note"]
    text = three_digits(number)
    return text if base is None or number == base else f"{text} ({three_digits(number / base)}x)"


def three_digits(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"


def _number(row: dict) -> float | None:
    return row.get("ms", row.get("mib"))


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
