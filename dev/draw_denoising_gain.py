#!/usr/bin/env python
"""Draw docs/pictures/denoising_gain.svg from the first table of docs/comparisons.md.

python dev/draw_denoising_gain.py
"""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
PICTURE = DOCS / "pictures" / "denoising_gain.svg"
LEFT, RIGHT, TOP, BOTTOM = 56, 440, 44, 230
TOP_AP = 60
COLORS = {"denoised": "#1f77b4", "without": "#ff7f0e"}


def read_curves(document: str) -> tuple[list[int], dict[str, list[float]]]:
    """Return the iterations and AP50 by row name of the table "With and without denoising"."""
    lines = document.split("## With and without denoising\n")[1].splitlines()
    table = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    iterations = [int(cell) for cell in table[0] if cell.isdigit()]
    return iterations, {row[0]: [float(cell) for cell in row[1:5]] for row in table[2:4]}


def draw(document: str) -> str:
    """Return the picture as SVG."""
    iterations, curves = read_curves(document)

    def at(iteration: float, ap: float) -> str:
        x = LEFT + (RIGHT - LEFT) * iteration / iterations[-1]
        return f"{x:.1f},{BOTTOM - (BOTTOM - TOP) * ap / TOP_AP:.1f}"

    def text(where: str, content: object, anchor: str = "middle", style: str = "") -> str:
        x, y = where.split(",")
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{style}>{content}</text>'

    title = "AP50 on synthetic images: same detector, same seed"
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 270" width="600" height="270"'
        ' font-family="sans-serif" font-size="13" fill="#222">',
        '<rect width="600" height="270" fill="#fff"/>',
        text(f"{LEFT},24", title, "start", ' font-size="15"'),
    ]
    for ap in range(0, TOP_AP + 1, 20):
        (x1, y), (x2, _) = at(0, ap).split(","), at(iterations[-1], ap).split(",")
        parts.append(f'<line x1="{x1}" y1="{y}" x2="{x2}" y2="{y}" stroke="#ddd"/>')
        parts.append(text(f"{LEFT - 8},{float(y) + 4:.1f}", ap, "end"))
    for iteration in iterations:
        parts.append(text(f"{at(iteration, 0).split(',')[0]},{BOTTOM + 18}", iteration))
    parts.append(text(f"{(LEFT + RIGHT) // 2},{BOTTOM + 35}", "training iterations"))
    for name, values in curves.items():
        color = COLORS[name.split()[0]]
        points = [at(*point) for point in zip(iterations, values, strict=True)]
        line = " ".join(points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        for point in points:
            x, y = point.split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{color}"/>')
        x, y = map(float, points[-1].split(","))
        style = f' fill="{color}" font-weight="bold"'
        parts.append(text(f"{x + 10:.1f},{y - 2:.1f}", values[-1], "start", style))
        label = name.replace("denoised", "with denoising")
        parts.append(text(f"{x + 10:.1f},{y + 14:.1f}", label, "start", style))
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    PICTURE.write_text(draw((DOCS / "comparisons.md").read_text()))
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
