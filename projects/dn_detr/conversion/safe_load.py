"""Load untrusted checkpoints without executing code from them."""

from __future__ import annotations

import argparse
import io
import json
import math
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}

MOST_HELD = 10_000
"""Values in a tuple of a pickle, counted as often as they are held."""

_PICKLES_OF_LEGACY = 5
"""Pickles at the start of a file of `torch.save` before torch 1.6."""


class StandIn:
    """Inert replacement for every class that a checkpoint references besides tensors."""

    def __new__(cls, *_args, **_kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass


def read_parameters(path: str | Path) -> dict[str, Tensor]:
    """Read the parameters of a .pth, .pt, .bin, .safetensors or Detectron2 .pkl file.

    Unwraps "model" and "state_dict" and removes the prefix "module." of distributed training.

    Returns:
        Name -> tensor [...] on the CPU.

    Raises:
        ValueError: if the file contains no parameters.
    """
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path)
    content = read_arrays(path) if Path(path).suffix == ".pkl" else read_pickle(path)
    for name in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict):
        raise ValueError(
            f"the file must contain a dictionary of parameters, got a {type(content).__name__}"
        )
    state = as_parameters({k: v for k, v in content.items() if isinstance(v, Tensor)})
    if not state:
        raise ValueError(f"the file contains no parameters, only {sorted(map(str, content))[:8]}")
    return state


def as_parameters(state: dict) -> dict[str, Tensor]:
    """Return tensors and arrays as dense tensors, named without "module." of distributed training.

    Raises:
        ValueError: A name is no string, a value is not dense or not of numbers, or two names
            differ only in "module." and have different values.
    """
    parameters: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"its names must be strings, got {name!r}")
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "fiub" or value.itemsize > 8 or not value.dtype.isnative:
                raise ValueError(f"{name} must be an array of numbers, got {value.dtype}")
            value = torch.from_numpy(value.copy())
        if kind := _kind_if_not_dense(value):
            raise ValueError(f"{name} must be a dense tensor, got {kind} one")
        short = name.removeprefix("module.")
        if short in parameters and not is_same(parameters[short], value):
            raise ValueError(f"{short} and module.{short} have different values")
        parameters[short] = value
    return parameters


def _kind_if_not_dense(value: Tensor) -> str:
    for kind in ("meta", "quantized", "nested"):
        if getattr(value, f"is_{kind}"):
            return f"a {kind}"
    if value.layout != torch.strided:
        return "a sparse"
    is_expanded = value.untyped_storage().nbytes() < value.numel() * value.element_size()
    return "an expanded" if is_expanded else ""


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of any shape are equal, type included."""
    return one.dtype == other.dtype and torch.equal(one, other)


def read_pickle(path: str | Path, *, mmap: bool = False) -> object:
    """Read a file of `torch.save`, restricted to tensors and plain containers.

    Other classes, such as the arguments of its training script, become `StandIn`.

    Args:
        mmap: read tensors lazily; needs the zip format of torch.

    Raises:
        ValueError: if the file is damaged or not in this format.
    """
    with open(path, "rb"):  # later errors then concern the content, not access to the file
        pass
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type for entry in archive.infolist()):
                    raise ValueError("torch.save compresses nothing, and little may become much")
                if not mmap and archive.testzip() is not None:
                    raise ValueError("a checksum is wrong")
                for name in archive.namelist():
                    if name.endswith("data.pkl"):
                        check_pickle(io.BytesIO(archive.read(name)))
        else:
            with open(path, "rb") as file:
                check_pickle(file, _PICKLES_OF_LEGACY)
        with torch.serialization.safe_globals(_stand_ins(path)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged files may raise any exception
        raise ValueError("the file is damaged or was not written by torch.save") from error


def check_pickle(file: BinaryIO, number: int = 1) -> None:
    """Refuse pickles of a few bytes that need hours or gigabytes to read.

    To hash a tuple is to visit all that it holds, as often as it is held: nested tuples double it
    with every three bytes. `bytearray(n)`, which `torch.load` calls, allocates n bytes.

    Args:
        file: Open at the start of a pickle.
        number: How many pickles follow each other.

    Raises:
        ValueError: A tuple holds more than MOST_HELD values, or the pickle is damaged.
    """
    for _ in range(number):
        stack, memo = [], {}  # how many values each object holds; None: a mark
        for code, value, _ in pickletools.genops(file):
            before, held = code.stack_before, []
            if pickletools.markobject in before:
                before = before[: before.index(pickletools.markobject)]
                while (size := stack.pop()) is not None:
                    held.append(size)
            held += [stack.pop() for _ in before]
            is_fixed = code.name.startswith(("TUPLE", "FROZENSET"))
            size = sum(held) + 1 if is_fixed else max(held, default=1)
            if code.name.endswith("GET"):
                size = memo[value]
            elif code.name.endswith("PUT"):
                memo[value] = stack[-1]
            elif code.name == "MEMOIZE":
                memo[len(memo)] = size
            if size > MOST_HELD or value in ("builtins bytearray", "__builtin__ bytearray"):
                raise ValueError("its objects would need too much time or memory")
            is_mark = code.name == "MARK"
            stack += [None if is_mark else size for _ in code.stack_after]


def _stand_ins(path: str | Path) -> list:
    """Replacements for the classes that the file references, as `safe_globals` takes them."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except ValueError:  # format before torch 1.6, whose references cannot be listed
        return [argparse.Namespace]
    return [(type("StandIn", (StandIn,), {}), name) for name in names]


class ArrayUnpickler(pickle.Unpickler):
    """Unpickler for arrays and plain containers; other classes and functions become `StandIn`."""

    ALLOWED = frozenset(
        [
            *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
            *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("collections", "OrderedDict"),
            ("_codecs", "encode"),
        ]
    )

    def find_class(self, module, name):
        if name == "_reconstruct" and (module, name) in self.ALLOWED:
            return lambda *_args: np.empty(0)  # gets its shape and values with its state
        return super().find_class(module, name) if (module, name) in self.ALLOWED else StandIn


def read_arrays(path: str | Path) -> object:
    """Read a pickle file of the Detectron2 model zoo; floating-point arrays become tensors."""
    with open(path, "rb") as file:
        try:
            check_pickle(file)
            file.seek(0)
            return _to_tensors(ArrayUnpickler(file, encoding="latin1").load(), {})
        except Exception as error:  # damaged files may raise any exception
            reason = str(error).rstrip(".")
            raise ValueError(f"the file is damaged or not a pickle file: {reason}") from error


def _to_tensors(value, done: dict[int, dict]):
    """done: id of a dict -> its copy; a dict may occur several times, also in itself."""
    if isinstance(value, dict):
        if id(value) not in done:
            done[id(value)] = copy = {}
            copy.update((key, _to_tensors(inner, done)) for key, inner in value.items())
        return done[id(value)]
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.itemsize > 8:
        return value
    return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file: an eight-byte size, a JSON header, then raw data.

    Raises:
        ValueError: The file is damaged, is no .safetensors file or has an unsupported type.
    """
    data = memoryview(Path(path).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    if data[8:9] != b"{":
        raise ValueError("the file is no safetensors file")
    if start > len(data):
        raise ValueError("the file is damaged: it ends inside its header")
    entries = {}
    try:
        header = json.loads(bytes(data[8:start]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = map(int, entry["data_offsets"])
            shape = tuple(map(int, entry["shape"]))
            if min(shape, default=0) < 0 or math.prod(n or 1 for n in shape) >= 2**63:
                raise ValueError(f"{name} has the shape {shape}")
            entries[name] = str(entry["dtype"]), shape, begin, end
        if sum(end - begin for *_, begin, end in entries.values()) > len(data) - start:
            raise ValueError("its tensors share their data")
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ValueError("the file is damaged: its header cannot be read") from error
    return {name: _safetensor(name, data[start:], *entry) for name, entry in entries.items()}


def _safetensor(
    name: str, data: memoryview, type_name: str, shape: tuple[int, ...], begin: int, end: int
) -> Tensor:
    if type_name not in SAFETENSORS_TYPES:
        raise ValueError(f"{name} has unsupported type {type_name}")
    dtype = SAFETENSORS_TYPES[type_name]
    if not 0 <= begin <= end <= len(data) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the file is damaged: it does not hold all of {name}")
    raw = bytearray(data[begin:end])
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)
