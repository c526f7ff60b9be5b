"""Matching is tested as compiled operators and as their plain twins."""

from contextlib import nullcontext

import pytest

from dn_detr.ops.extension import KERNELS, pytorch_operators


@pytest.fixture(params=["compiled", "plain"])
def operators(request):
    """Name of what runs: the kernels, or what stands in for them."""
    if request.param == "compiled" and "cpu" not in KERNELS.get("assign_objects", ()):
        pytest.skip("no kernels for the cpu")
    with nullcontext() if request.param == "compiled" else pytorch_operators():
        yield request.param
