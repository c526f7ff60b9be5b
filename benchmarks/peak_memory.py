"""Peak memory of a call beyond its inputs, in MiB.

On CUDA from the allocator. On the CPU from the operating system's peak of a new process, which
counts touched memory of any allocator. The process first runs a small case, to load libraries and
start threads, and returns freed memory immediately, so that neither hides memory of the call.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_mib(device: str, prepare: Callable, small: tuple | None, large: tuple) -> float | None:
    """Measure `prepare(*large)()`, after `prepare(*small)()` if given; None if it is not known.

    prepare: a function of a module that can be imported, with arguments that can be pickled.
    """
    if device == "cuda":
        return _on_cuda(prepare, small, large)
    if not Path("/proc/self/clear_refs").exists():
        return None
    before = {name: os.environ.get(name) for name in GIVE_BACK}
    os.environ.update(GIVE_BACK)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            threads = torch.get_num_threads()
            return pool.submit(_on_cpu, prepare, small, large, threads).result()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _on_cuda(prepare: Callable, small: tuple | None, large: tuple) -> float:
    if small is not None:
        prepare(*small)()
    run = prepare(*large)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _on_cpu(prepare: Callable, small: tuple | None, large: tuple, threads: int) -> float:
    torch.set_num_threads(threads)
    if small is not None:
        prepare(*small)()
    run = prepare(*large)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_mib("VmRSS")
    run()
    return _status_mib("VmHWM") - before


def _status_mib(name: str) -> float:
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found.group(1)) / 1024
