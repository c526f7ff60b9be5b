"""What the benchmarks share: timing side by side, where it ran, tables, results as JSON."""

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
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument(
        "--seconds", type=float, help="time for each comparison (at least 3 rounds are run)"
    )
    parser.add_argument(
        "--save", nargs="?", const="", metavar="FILE",
        help="write into FILE, by default benchmarks/results/<device>.json",
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
    """Run the candidates in turn, round after round, so that each ratio comes from one run.

    Before the first round each has a warm-up, which counts where it takes long. A fast candidate runs
    several times a round. On CUDA
    the time on the clock from launch to end; busy_only: only the device's own, with all launches
    queued before it starts (which needs candidates that do not wait for the device).
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


def _device_ms(prepare: Prepare, device: str) -> float:
    run = prepare()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host queues the launches
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def count_launches(run: Callable[[], object]) -> dict[str, int]:
    """Kernels and copies that `run` puts on the CUDA device, and how often the host waits for it."""
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
    """GB/s, read and written, of copying a tensor: the practical peak of the memory."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    copy = {"copy": lambda: lambda: target.copy_(source)}
    timing = time_side_by_side(copy, device, seconds=0.2, busy_only=True)["copy"]
    return 2 * source.numel() * 4 / (timing.ms * 1e6)


# -------------------------------------------------------------------------------------- equality


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Length of the difference over the length of what is expected; infinite where NaN."""
    difference = (got.detach().double() - expected.double()).norm()
    error = (difference / expected.double().norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


# --------------------------------------------------------------------------------------- results


def describe_machine(device: str) -> dict[str, str | int | None]:
    """Where and with what a result was measured."""
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
    """How this was called, without where it was saved."""
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
    """Short name of the commit, "+" where files other than results were changed since; outside of
    git, what DN_DETR_COMMIT says."""

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
    """Put `rows` into `section` of the file of results that was asked for, if any was.

    Rows of the same day, commit and machine stay if these do not replace them, so that a long
    comparison can be run in parts. keys: what tells rows apart, beside "who".
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
    """Markdown: a line for each combination of `keys`, a column for each "who", in milliseconds (or
    MiB), with how many times that of `against` it is."""
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
