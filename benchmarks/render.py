#!/usr/bin/env python
"""Write benchmarks/results/README.md: the tables of all results.

python benchmarks/render.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import RESULTS, markdown, table

TITLES = {
    "ms_deform_attn": "Deformable attention",
    "denoising_queries": "Denoising queries",
    "matcher": "Matching",
    "train_step": "Training steps",
    "auxiliary_queries": "What auxiliary queries cost",
}
COUNTS = ("kernels", "copies", "waits")


def render(folder: Path) -> str:
    """Return Markdown tables of every JSON file in `folder`."""
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/render.py` from the JSON files here. Milliseconds, or MiB",
        'if noted in the row; in brackets the factor to the first column ("dn_detr" or',
        '"denoised"). The docstring of each script in `benchmarks/` describes what it measures.',
    ]
    for path in sorted(folder.glob("*.json")):
        sections = json.loads(path.read_text())
        names = [name for name in TITLES if name in sections]
        if names:
            lines += ["", f"## {sections[names[0]]['machine']['device']}"]
        for name in names:
            lines += ["", f"### {TITLES[name]}", "", *render_section(sections[name])]
    return "\n".join(lines) + "\n"


def render_section(section: dict) -> list[str]:
    rows, keys = section["rows"], section["keys"]
    commands = ", ".join(f"`{command}`" for command in section["commands"])
    lines = [
        f"{commands}; {_where(section['machine'])}",
        "",
        table(rows, keys, against=section["against"]),
    ]
    speeds = [row for row in rows if "share_of_copy" in row and row["who"] == section["against"]]
    if speeds:
        copy = (
            f"A copy moves {section['copy_gb_per_s']:.0f} GB/s. Of the bytes that must be moved at"
        )
        who = f"least, {section['against']} moves (more than a copy where caches hold them):"
        lines += ["", copy, who, ""]
        body = [
            [
                *(str(row[key]) for key in keys),
                f"{row['gb_per_s']:.1f}",
                f"{row['share_of_copy']:.0%}",
            ]
            for row in speeds
        ]
        lines.append(markdown([*keys, "GB/s", "of a copy"], body))
    counted = [row for row in rows if COUNTS[0] in row]
    if counted:
        columns = ("who", *keys, *COUNTS)
        body = [[str(row[column]) for column in columns] for row in counted]
        lines += ["", "Launches, and how often the host waits for the device:", ""]
        lines.append(markdown(columns, body))
    if section.get("note"):
        lines += ["", section["note"]]
    if section.get("missing"):
        lines += ["", f"Not measured: {'; '.join(section['missing'])}."]
    return lines


def _where(machine: dict) -> str:
    facts = [f"torch {machine['torch']}", machine["cpu"]]
    facts += [f"{machine['instructions']}, {machine['threads']} threads"]
    facts += [f"{tool} {machine[tool]}" for tool in ("compiler", "nvcc") if machine.get(tool)]
    return f"{', '.join(facts)}; commit {machine['commit']}, {machine['date']}."


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS, help="folder of the JSON files")
    folder = parser.parse_args().folder
    (folder / "README.md").write_text(render(folder))
    print(f"wrote {folder / 'README.md'}")


if __name__ == "__main__":
    main()
