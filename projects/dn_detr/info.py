"""`python -m dn_detr.info`: report versions and compiled operators, for bug reports."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

import torch

import dn_detr
from dn_detr import install_detectron2

PACKAGES = ("torchvision", "fvcore", "numpy", "scipy", "pycocotools")


def report() -> str:
    """Collect the report as lines of a name and a value.

    Does not import Detectron2; an incompatible extension is reported, not raised.
    """
    facts = {
        "dn_detr": dn_detr.__version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "CPU": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "GPU": _gpus(),
        **{name: _version(name) for name in PACKAGES},
        "detectron2": install_detectron2.describe(),
        **_extension(),
    }
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def _extension() -> dict[str, str]:
    """Report how the extension was built, and the devices of each operator."""
    try:
        from dn_detr.ops import extension
    except ImportError as error:
        return {"operators": f"cannot be loaded: {error}"}
    if not extension.KERNELS:
        return {"operators": f"plain PyTorch only: {extension.why_no_kernel('cpu')}"}
    record = extension.read_record() or {}
    facts = {"built for": f"torch {record['torch']}, by {record['compiler']}"}
    if record["no_cuda"]:
        facts["CUDA operators"] = f"none: {record['no_cuda']}"
    else:
        facts["CUDA operators"] = f"for {record['architectures']}, by nvcc {record['nvcc']}"
    for name, devices in extension.KERNELS.items():
        facts[name] = "compiled for " + " and ".join(device.upper() for device in sorted(devices))
    return facts


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m dn_detr.info", description=__doc__).parse_args()
    print(report())
