"""Shared by all rooms: real data, where a checkout has some beside it."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data():
    """Folder with `coco128` and `bccd`, from DN_DETR_TEST_DATA; skips the test where absent."""
    beside_checkout = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DN_DETR_TEST_DATA", beside_checkout))
    if not (folder / "coco128").is_dir():
        pytest.skip(f"no real data in {folder} (set DN_DETR_TEST_DATA)")
    return folder
