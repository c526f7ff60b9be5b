"""Comparison with the authors' code: `pytest tests/equivalence --peers FOLDER`, or DN_DETR_PEERS.

FOLDER holds their checkouts under the names of their repositories (DN-DETR, DAB-DETR, ...). A test
whose checkout is absent is skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--peers", help="folder with the authors' checkouts")


@pytest.fixture
def authors(request, monkeypatch):
    """authors(repository) -> a function that imports a module of that checkout by name."""
    from peers import open_checkout

    folder = request.config.getoption("--peers", default=None) or os.environ.get("DN_DETR_PEERS")

    def open_repository(name: str):
        if not folder or not (Path(folder) / name).is_dir():
            pytest.skip(f"no checkout of {name} (give --peers FOLDER or DN_DETR_PEERS)")
        return open_checkout(Path(folder) / name, monkeypatch)

    return open_repository


@pytest.fixture
def inputs():
    """Three features of two images of unequal size, and their padding."""
    torch.manual_seed(0)
    features = [torch.randn(2, c, 160 // s, 192 // s) for c, s in ((8, 8), (16, 16), (24, 32))]
    padding = torch.zeros(2, 160, 192, dtype=torch.bool)
    padding[1, 96:] = True
    padding[1, :, 128:] = True
    return features, padding


def pytest_terminal_summary(terminalreporter):
    from table import rows

    lines = rows()
    if lines:
        terminalreporter.section("largest relative difference from the authors' code")
        terminalreporter.write_line("\n".join(lines))
