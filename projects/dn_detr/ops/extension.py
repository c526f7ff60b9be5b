"""Loads the compiled operators `dn_detr._C`, once, and knows why where there are none."""

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
    "noise_objects_in_old_memory",
    "matching_costs",
    "assign_objects",
    "has_nonfinite",
)
IS_SWITCHED_OFF = os.environ.get("DN_DETR_NO_EXTENSION") == "1"
BUILD = "pip install --no-build-isolation -e ."
REBUILD = f"rebuild with `{BUILD}`"


class ExtensionMismatch(ImportError):
    """The compiled operators were built for another torch than the one that is running."""


def read_record(package: Path = PACKAGE) -> dict[str, Any] | None:
    """What the last build wrote down (`_build.json`), or None if nothing was ever built."""
    path = package / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else None


def find_library(package: Path = PACKAGE) -> Path | None:
    """Path of the compiled library, or None."""
    found = (path for path in sorted(package.glob("_C.*")) if path.suffix in (".so", ".pyd"))
    return next(found, None)


def check_record(
    record: dict[str, Any] | None, torch_version: str, cuda_version: str | None
) -> None:
    """Raise ExtensionMismatch unless the library was built for this torch.

    Compared are the release (2.11.0) and the CUDA version. It is asked before the library is
    loaded: a library of another torch fails with an undefined symbol, or worse, with wrong memory.
    """
    if record is None:
        raise ExtensionMismatch(f"dn_detr._C has no _build.json of its build beside it; {REBUILD}")
    built = (record["torch"].split("+")[0], record["cuda"])
    if built != (torch_version.split("+")[0], cuda_version):
        raise ExtensionMismatch(
            f"dn_detr._C was built for torch {record['torch']} (CUDA {record['cuda']}), this is "
            f"torch {torch_version} (CUDA {cuda_version}); {REBUILD}"
        )


def _load() -> dict[str, frozenset[str]]:
    """Operator name -> device types that have a kernel; empty without a library."""
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
_is_plain = False


def why_no_kernel(device: str) -> str:
    """One sentence for people: why the operators run as plain PyTorch on `device`."""
    record = read_record() or {}
    if IS_SWITCHED_OFF:
        return "dn_detr._C is not loaded because DN_DETR_NO_EXTENSION=1"
    if not KERNELS:
        return record.get("no_extension") or "dn_detr._C is not built"
    if device == "cuda" and record.get("no_cuda"):
        return f"dn_detr._C was {record['no_cuda']}"
    return f"dn_detr._C has no kernels for {device}"


def slow_sentence(device: str) -> str:
    """Why the operators run as plain PyTorch on `device`, and what to type; "" if they do not."""
    if KERNELS and all(device in kinds for kinds in KERNELS.values()):
        return ""
    force = "FORCE_CUDA=1 " if device == "cuda" else ""
    return (
        f"{why_no_kernel(device)}; the operators run as plain PyTorch, several times slower. Build them "
        f"with `{force}{BUILD}`; `python -m dn_detr.info` says more."
    )


@contextmanager
def pytorch_operators() -> Iterator[None]:
    """Inside, every operator runs, and is traced, as plain PyTorch: for graphs that must consist of
    standard operators alone, such as an exported model that runs without this package.

        with pytorch_operators():
            exported = torch.export.export(model, inputs)

    For the whole process, not for one thread.
    """
    global _is_plain
    before, _is_plain = _is_plain, True
    try:
        yield
    finally:
        _is_plain = before


def use_kernel(name: str, device: torch.device) -> bool:
    """Whether operator `name` has a kernel for tensors on `device`.

    Warns, once per process and device type, where there is none on a CPU or a CUDA device. An ONNX
    graph is made of plain PyTorch, as is everything inside of `pytorch_operators`.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore
    if _is_plain or (is_traced and torch.onnx.is_in_onnx_export()):
        return False
    if device.type in KERNELS.get(name, ()):
        return True
    if device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
        reason = why_no_kernel(device.type)
        if reason not in _warned:
            _warned.add(reason)
            warnings.warn(slow_sentence(device.type), stacklevel=3)
    return False
