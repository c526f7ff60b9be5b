"""ARCHITECTURE.md names every file."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for folder in ("projects/dn_detr", "csrc", "tools", "examples", "benchmarks", "dev")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".sh") and path.name != "__init__.py"
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_architecture_names_this_file(path):
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert f"{path.name}`" in text
