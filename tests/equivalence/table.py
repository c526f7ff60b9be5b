"""The table method x (what was compared) that a run of these tests prints at its end."""

from __future__ import annotations

COLUMNS = (
    "outputs",
    "losses",
    "gradients",
    "starting values",
    "optimizer groups",
    "20 steps",
    "detections",
)
_CELLS: dict[tuple[str, str], float] = {}


def record(method: str, column: str, value: float) -> None:
    """Keep the largest `value` (a difference from the authors' code) of a method and a column."""
    assert column in COLUMNS, column
    _CELLS[method, column] = max(float(value), _CELLS.get((method, column), 0.0))


def rows() -> list[str]:
    """Lines of the table; a cell without a number was not compared in this run."""
    methods = sorted({method for method, _ in _CELLS})
    if not methods:
        return []
    width = max(map(len, methods))
    lines = ["  ".join([" " * width, *COLUMNS])]
    for method in methods:
        cells = (_CELLS.get((method, column)) for column in COLUMNS)
        numbers = ("-" if value is None else f"{value:.1e}" for value in cells)
        pairs = zip(COLUMNS, numbers, strict=True)
        lines.append("  ".join([method.ljust(width), *(n.rjust(len(c)) for c, n in pairs)]))
    return lines
