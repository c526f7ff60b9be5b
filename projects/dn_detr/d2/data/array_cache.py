"""Arrays made from a file, kept by its content and mapped into the memory of all processes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch

from dn_detr.datasets.cache import cache_folder, evict, replacing

logger = logging.getLogger(__name__)

SMALL = 1 << 20
"""Bytes of a file that is parsed faster than a cache is looked up."""


def content_key(path: Path, salt: str) -> str | None:
    """Return a hash of a file's content and of `salt`; None for small files, not worth keeping."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < SMALL:
            return None
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}-{salt}"


def kept(key: str | None, make: Callable[[], dict]) -> dict:
    """Return what `make` returns, tensors and plain values, mapped from the cache if possible."""
    if key is None:
        return make()
    path = cache_folder() / f"{key}.pt"
    found, made = _open(path), None
    try:
        if found is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process reads, others wait for its arrays
                if (found := _open(path)) is None:
                    made = make()
                    with replacing(path) as file:
                        torch.save(made, file)
                    evict(path)
                    found = _open(path)
    except (OSError, RuntimeError) as error:  # torch's, on a full disk
        logger.warning(f"checked annotations are not kept in {path.parent}: {error}")
    return found or made or make()


def _open(path: Path) -> dict | None:
    """Map saved arrays into memory; None if there are none."""
    try:
        with contextlib.suppress(OSError):
            os.utime(path)  # for `evict`
        return torch.load(path, mmap=True, weights_only=True)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        logger.warning(f"{path} is broken and made again: {error}")
        return None
