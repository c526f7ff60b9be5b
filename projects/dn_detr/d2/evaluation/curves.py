"""Losses and AP of trainings from their metrics.json, as curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from dn_detr.d2.inference.plot_text import literal_text
from dn_detr.errors import InputError

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
        raise InputError(f"there is no {file}.")
    entries: dict[int, dict] = {}
    for line in file.read_text().splitlines():
        if line.strip():
            entry = json.loads(line)
            entries.setdefault(entry["iteration"], {}).update(entry)
    return dict(sorted(entries.items()))


def series(entries: dict[int, dict], name: str) -> tuple[list[int], list[float]]:
    points = [(iteration, entry[name]) for iteration, entry in entries.items() if name in entry]
    return [x for x, _ in points], [y for _, y in points]


def test_sets(entries: dict[int, dict]) -> list[str]:
    """Return the prefixes of AP: "" with one test set, else "<dataset>/" of each."""
    names = dict.fromkeys(name for entry in entries.values() for name in entry)
    found = [name.removesuffix("bbox/AP") for name in names if name.endswith("bbox/AP")]
    return [prefix for prefix in found if not prefix.startswith("ema/")]


def draw(runs: dict[str, dict[int, dict]]) -> Figure:
    """Draw losses, AP of every test set and instability metrics, a panel each.

    Several runs differ by colour.
    """
    sets = dict.fromkeys(prefix for entries in runs.values() for prefix in test_sets(entries))
    present = [n for n in INSTRUMENTS if any(series(entries, n)[0] for entries in runs.values())]
    ap = {"ylabel": "AP", "ylim": (0, None)}
    panels = [
        (("-", "--", ":"), LOSSES, {"ylabel": "loss", "yscale": "log", "title": "training losses"}),
        *(
            (
                ("o-", "s--"),
                {prefix + name: title for name, title in METRICS.items()},
                {**ap, "title": f"validation {prefix[:-1]}".strip()},
            )
            for prefix in sets or [""]
        ),
        *((("o-",), {n: ""}, {"ylim": (0, None), "title": INSTRUMENTS[n]}) for n in present),
    ]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 4 * rows), layout="constrained", dpi=110)
    for number, (styles, names, settings) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, 2, number, xlabel="iteration", **settings)
        axes.grid(alpha=0.3)
        for index, (run, entries) in enumerate(runs.items()):
            for style, (name, title) in zip(styles, names.items(), strict=True):
                x, y = series(entries, name)
                label = f"{run}: {title}" if title and len(runs) > 1 else title or run
                if x:
                    color = f"C{index}" if len(runs) > 1 else None
                    axes.plot(x, y, style, label=label, color=color)
        if axes.lines:
            axes.legend()
    return figure


def plot(runs: Sequence[str], output: Path) -> None:
    """Draw the curves of trainings into a file.

    Args:
        runs: Output folders or their metrics.json, or label=folder.
        output: The picture.
    """
    entries = {}
    for run in runs:
        label, _, path = run.rpartition("=")
        entries[label or Path(path).name] = read_metrics(Path(path))
    names = [name for run in entries.values() for name in test_sets(run)]
    output.parent.mkdir(parents=True, exist_ok=True)
    with literal_text([*entries, *names]):
        draw(entries).savefig(output)
