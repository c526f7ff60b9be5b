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

LOSSES = {"total_loss": "total", "loss_match": "matched", "loss_dn": "denoising"}
METRICS = {"bbox/AP50": "AP50", "bbox/AP": "AP"}
INSTRUMENTS = {
    "matching/instability": "queries per image with a changed match",
    "matching/anchor_distance": "L1 distance of anchors to matched objects",
}
"""Metrics of TEST.INSTABILITY, each in a panel if a run has it."""


def read_metrics(run: Path) -> dict[int, dict]:
    """Read metrics.json as iteration -> values; later entries replace earlier ones."""
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
    """Plot losses, AP and instability metrics, a panel each; several runs differ by colour."""
    present = [n for n in INSTRUMENTS if any(series(entries, n)[0] for entries in runs.values())]
    rows = 2 if present else 1
    figure, grid = plt.subplots(
        rows, 2, figsize=(11, 4 * rows), squeeze=False, constrained_layout=True
    )
    panels = list(grid.flat)
    for empty in panels[2 + len(present) :]:
        empty.remove()
    panels = panels[: 2 + len(present)]
    for index, (label, entries) in enumerate(runs.items()):
        prefix = f"{label}: " if len(runs) > 1 else ""
        color = f"C{index}" if len(runs) > 1 else None
        for axes, styles, names in (
            (panels[0], ("-", "--", ":"), LOSSES),
            (panels[1], ("o-", "s--"), METRICS),
            *((axes, ("o-",), {n: label}) for axes, n in zip(panels[2:], present, strict=True)),
        ):
            for style, (name, title) in zip(styles, names.items(), strict=True):
                x, y = series(entries, name)
                if x:
                    text = title if axes in panels[2:] else prefix + title
                    axes.plot(x, y, style, label=text, color=color)
    panels[0].set(ylabel="loss", yscale="log", title="training losses")
    panels[1].set(ylabel="AP", ylim=(0, None), title="validation")
    for axes, name in zip(panels[2:], present, strict=True):
        axes.set(ylim=(0, None), title=INSTRUMENTS[name])
    for axes in panels:
        axes.set(xlabel="iteration")
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
    output = args.output if args.output.suffix else args.output.with_suffix(".png")
    runs = {}
    for run in args.runs:
        label, _, path = run.rpartition("=")
        runs[label or Path(path).name] = read_metrics(Path(path))
    plot(runs, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
