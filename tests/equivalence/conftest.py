"""Comparison with the authors' code: `pytest tests/equivalence --peers FOLDER`, or DN_DETR_PEERS.

FOLDER holds their checkouts under the names of their repositories (DN-DETR, DAB-DETR, ...). A test
whose checkout is absent is skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peers import NUM_POINTS

from dn_detr.losses.mask_points import CANDIDATES, MATCHING, RANDOM


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
def float64(monkeypatch):
    """Both sides compute in float64, also where code asks for float32 by name."""
    from peers import use_float64

    float32 = torch.float32
    use_float64(monkeypatch)
    yield
    torch.set_default_dtype(float32)  # torch.float32 is still another here


@pytest.fixture
def inputs(float64):  # noqa: ARG001
    """Three features of two images of unequal size, and their padding."""
    torch.manual_seed(0)
    features = [torch.randn(2, c, 160 // s, 192 // s) for c, s in ((8, 8), (16, 16), (24, 32))]
    padding = torch.zeros(2, 160, 192, dtype=torch.bool)
    padding[1, 96:] = True
    padding[1, :, 128:] = True
    return features, padding


@pytest.fixture
def fixed_points(monkeypatch, float64):  # noqa: ARG001
    """Both sides draw the same points: theirs by torch.rand, ours by stream."""
    generator = torch.Generator().manual_seed(8)
    drawn = {
        stream: torch.rand(count, 2, generator=generator) * 0.9 + 0.05
        for stream, count in (
            (CANDIDATES, 3 * NUM_POINTS),
            (RANDOM, NUM_POINTS // 4),
            (MATCHING, NUM_POINTS),
        )
    }

    def ours(keys, count, stream):
        assert drawn[stream].shape[0] == count
        return drawn[stream].expand(keys.shape[0], -1, -1)

    rand = torch.rand

    def theirs(*size, **options):
        if "generator" in options:
            return rand(*size, **options)
        for values in drawn.values():
            if size[1:] == values.shape:
                return values.expand(size[0], -1, -1).clone()
        raise AssertionError(f"unexpected random numbers {size}")

    for subpackage in ("mask_points", "mask_costs"):
        monkeypatch.setattr(f"dn_detr.losses.{subpackage}.random_points", ours)
    monkeypatch.setattr(torch, "rand", theirs)


def pytest_terminal_summary(terminalreporter):
    from table import rows

    lines = rows()
    if lines:
        terminalreporter.section("largest relative difference from the authors' code")
        terminalreporter.write_line("\n".join(lines))
