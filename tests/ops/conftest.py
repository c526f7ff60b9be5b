"""Every operator is tested in PyTorch, and as a kernel on each device that has one."""

import pytest
import torch

from dn_detr import ops
from dn_detr.ops.extension import KERNELS

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def _variants(name):
    return [("pytorch", device) for device in DEVICES] + [
        ("kernel", device) for device in DEVICES if device in KERNELS.get(name, ())
    ]


def pytest_generate_tests(metafunc):
    """`attend`, `deform` and `noise`: (function, device) of each variant of an operator."""
    for argument, name in (
        ("attend", "ms_deform_attn"),
        ("deform", "deformable_attention"),
        ("noise", "noise_objects"),
    ):
        if argument in metafunc.fixturenames:
            variants = _variants(name)
            values = [
                (getattr(ops, name if kind == "kernel" else f"{name}_pytorch"), device)
                for kind, device in variants
            ]
            metafunc.parametrize(argument, values, ids=["-".join(v) for v in variants])


@pytest.fixture(params=DEVICES)
def kernel_device(request):
    """A device on which the operators are compiled."""
    if request.param not in KERNELS.get("ms_deform_attn", ()):
        pytest.skip(f"no kernels for {request.param}")
    return request.param


@pytest.fixture(params=DEVICES)
def deform_device(request):
    """A device on which `deformable_attention` is compiled."""
    if request.param not in KERNELS.get("deformable_attention", ()):
        pytest.skip(f"no kernel for {request.param}")
    return request.param
