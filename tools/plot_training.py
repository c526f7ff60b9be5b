#!/usr/bin/env python
"""Plot losses and AP of one or several runs from their metrics.json.

    python tools/plot_training.py output/demo --output curves.png
    python tools/plot_training.py denoised=output/a plain=output/b --output comparison.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOSSES = {"total_loss": "total", "loss_match": "matched", "loss_denoise": "denoising"}
METRICS = {"bbox/AP50": "AP50", "bbox/AP": "AP"}


def read_metrics(run: Path) -> dict[int, dict]:
    """metrics.json as iteration -> values; after a resume the later entry counts."""
    file = run / "metrics.json" if run.is_dir() else run
    if not file.is_file():
        sys.exit(f"plot_training.py: there is no {file}")
    entries: dict[int, dict] = {}
    for line in file.read_text().splitlines():
        if line.strip():
            entry = json.loads(line)
            entries.setdefault(entry["iteration"], {}).update(entry)
    return dict(sorted(entries.items()))


def series(entries: dict[int, dict], name: str) -> tuple[list[int], list[float]]:
    points = [(iteration, entry[name]) for iteration, entry in entries.items() if name in entry]
    return [x for x, _ in points], [y for _, y in points]


def plot(runs: dict[str, dict[int, dict]], output: Path) -> None:
    """One panel of losses, one of AP; a colour for each run where there are several."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for index, (label, entries) in enumerate(runs.items()):
        prefix = f"{label}: " if len(runs) > 1 else ""
        for style, (name, title) in zip(("-", "--", ":"), LOSSES.items(), strict=True):
            x, y = series(entries, name)
            if x:
                color = f"C{index}" if len(runs) > 1 else None
                left.plot(x, y, style, label=prefix + title, color=color)
        for style, (name, title) in zip(("o-", "s--"), METRICS.items(), strict=True):
            x, y = series(entries, name)
            if x:
                color = f"C{index}" if len(runs) > 1 else None
                right.plot(x, y, style, label=prefix + title, color=color)
    left.set(xlabel="iteration", ylabel="loss", yscale="log", title="training losses")
    right.set(xlabel="iteration", ylabel="AP", ylim=(0, None), title="validation")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="output folder or metrics.json, or label=folder")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    runs = {}
    for run in args.runs:
        label, _, path = run.rpartition("=")
        runs[label or Path(path).name] = read_metrics(Path(path))
    plot(runs, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
