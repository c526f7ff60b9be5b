"""Shared by all tests: skips, with a reason, where Detectron2 or real data are missing."""

import importlib.util
import os
from pathlib import Path

import pytest

HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None
NEEDS_DETECTRON2 = ["d2", "tools"]
"""Folders and files beside this one."""

collect_ignore = [] if HAS_DETECTRON2 else NEEDS_DETECTRON2


def what_is_missing() -> list[str]:
    """A sentence for each thing without which a part of the product goes untested."""
    missing = []
    has_operators = HAS_DETECTRON2 and importlib.util.find_spec("detectron2._C") is not None
    if os.environ.get("DN_DETR_PYPI_DETECTRON2") == "1" and has_operators:
        missing.append("DN_DETR_PYPI_DETECTRON2 is set, but this Detectron2 has compiled operators")
    if not HAS_DETECTRON2:
        missing.append(
            f"Detectron2 is not installed: tests/{', tests/'.join(NEEDS_DETECTRON2)} are left out"
        )
    try:
        from dn_detr.ops.extension import KERNELS, why_no_kernel
    except ImportError as error:  # built for another torch
        missing.append(str(error))
    else:
        if "cpu" not in KERNELS.get("ms_deform_attn", ()):
            missing.append(f"{why_no_kernel('cpu')}: compiled operators are not tested")
    return missing


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """Checked annotations are not kept in the cache of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DN_DETR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_sessionstart():
    missing = what_is_missing()
    if missing and os.environ.get("DN_DETR_REQUIRE_ALL") == "1":
        pytest.exit(f"DN_DETR_REQUIRE_ALL is set, but: {'; '.join(missing)}", returncode=1)


def pytest_report_header():
    return what_is_missing()


def pytest_terminal_summary(terminalreporter):
    for sentence in what_is_missing():
        terminalreporter.write_line(f"NOT TESTED: {sentence}", yellow=True)


@pytest.fixture(scope="session")
def real_data():
    """Folder with `coco128` and `bccd`, from DN_DETR_TEST_DATA; skips the test where absent."""
    beside_checkout = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DN_DETR_TEST_DATA", beside_checkout))
    if not (folder / "coco128").is_dir():
        pytest.skip(f"no real data in {folder} (set DN_DETR_TEST_DATA)")
    return folder
