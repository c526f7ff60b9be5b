"""Load the compiled operators `dn_detr._C`, or report why they are missing."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parents[1]
OPERATORS = (
    "deformable_attention",
    "deformable_attention_backward",
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "noise_objects",
    "matching_costs",
    "assign_objects",
    "has_nonfinite",
)
IS_SWITCHED_OFF = os.environ.get("DN_DETR_NO_EXTENSION") == "1"
BUILD = "pip install --no-build-isolation -e ."
REBUILD = f"rebuild with `{BUILD}`"


class ExtensionMismatch(ImportError):
    """The compiled operators were built for a different torch."""


def read_record(package: Path = PACKAGE) -> dict[str, Any] | None:
    """Return the record of the last build (`_build.json`), or None if there was none."""
    path = package / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else None


def find_library(package: Path = PACKAGE) -> Path | None:
    """Return the path of the compiled library, or None."""
    found = (path for path in sorted(package.glob("_C.*")) if path.suffix in (".so", ".pyd"))
    return next(found, None)


def check_record(
    record: dict[str, Any] | None, torch_version: str, cuda_version: str | None
) -> None:
    """Check that the library was built for this torch release and CUDA version.

    To be called before loading: a library of another torch fails with an undefined symbol or
    corrupts memory.

    Raises:
        ExtensionMismatch: If it was not.
    """
    if record is None:
        raise ExtensionMismatch(f"dn_detr._C has no _build.json next to it; {REBUILD}")
    built = (record["torch"].split("+")[0], record["cuda"])
    if built != (torch_version.split("+")[0], cuda_version):
        raise ExtensionMismatch(
            f"dn_detr._C was built for torch {record['torch']} (CUDA {record['cuda']}), this is "
            f"torch {torch_version} (CUDA {cuda_version}); {REBUILD}"
        )


def _load() -> dict[str, frozenset[str]]:
    """Load the library and map operators to device types with a kernel; empty without library."""
    library = find_library()
    if library is None or IS_SWITCHED_OFF:
        return {}
    check_record(read_record(), torch.__version__, torch.version.cuda)
    torch.ops.load_library(str(library))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        name: frozenset(
            device for device in ("cpu", "cuda") if has_kernel(f"dn_detr::{name}", device.upper())
        )
        for name in OPERATORS
    }


KERNELS = _load()
_warned: set[str] = set()
_force_pytorch = False


def why_no_kernel(device: str) -> str:
    """Return why the operators run in PyTorch on `device`, as a clause of a sentence."""
    record = read_record() or {}
    if IS_SWITCHED_OFF:
        return "dn_detr._C is not loaded because DN_DETR_NO_EXTENSION=1"
    if not KERNELS:
        return record.get("no_extension") or "dn_detr._C is not built"
    if device == "cuda" and record.get("no_cuda"):
        return f"dn_detr._C was {record['no_cuda']}"
    return f"dn_detr._C has no kernels for {device}"


def slow_sentence(device: str) -> str:
    """Return why the operators are slow on `device` and how to build them; "" if they are not."""
    if KERNELS and all(device in kinds for kinds in KERNELS.values()):
        return ""
    force = "FORCE_CUDA=1 " if device == "cuda" else ""
    return (
        f"{why_no_kernel(device)}; the operators run as plain PyTorch, several times slower. "
        f"Build them with `{force}{BUILD}`; see `python -m dn_detr.info` for details."
    )


@contextmanager
def pytorch_operators() -> Iterator[None]:
    """Run and trace all operators with their reference implementations in PyTorch.

    For graphs of standard operators only, such as an exported model that runs without this package:

        with pytorch_operators():
            exported = torch.export.export(model, inputs)

    Applies to the whole process, not to one thread.
    """
    global _force_pytorch
    before, _force_pytorch = _force_pytorch, True
    try:
        yield
    finally:
        _force_pytorch = before


def use_kernel(name: str, device: torch.device) -> bool:
    """Return whether to call the kernel of operator `name` on `device`.

    False in ONNX export and inside `pytorch_operators`. Warns once per process and device type if
    there is no kernel for a CPU or CUDA device.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore
    if _force_pytorch or (is_traced and torch.onnx.is_in_onnx_export()):
        return False
    if device.type in KERNELS.get(name, ()):
        return True
    if device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
        reason = why_no_kernel(device.type)
        if reason not in _warned:
            _warned.add(reason)
            warnings.warn(slow_sentence(device.type), stacklevel=3)
    return False
