"""Arrays made from a file, kept by its content and mapped into the memory of all processes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

SMALL = 1 << 20
"""Bytes of a file that is parsed faster than a cache is looked up."""

_SETTLED = 2.0  # seconds after which a changed file surely gets another time stamp


def cache_folder() -> Path:
    """Return the folder of checked arrays: DN_DETR_CACHE, else dn_detr in the user's cache."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("DN_DETR_CACHE") or f"{user}/dn_detr").expanduser()


def _digest(*data: bytes) -> str:
    state = hashlib.sha256()
    for part in data:
        state.update(part)
    return state.hexdigest()[:32]


def content_key(path: Path, salt: bytes) -> tuple[str | None, bytes | None]:
    """Return a hash of content and salt, and the content unless size and time tell the hash.

    The hash of a small file is None: it is not worth keeping anything.
    """
    status = path.stat()
    if status.st_size < SMALL:
        return None, path.read_bytes()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, _digest(salt)]
    note = cache_folder() / f"{_digest(os.path.realpath(path).encode())}.json"
    with suppress(OSError, ValueError, TypeError):  # no note, or none of ours
        *known, key = json.loads(note.read_bytes())
        if known == stamp:
            return key, None
    data = path.read_bytes()
    key = _digest(data, salt)
    if time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED:
        with suppress(OSError):
            _write(note, lambda file: file.write(json.dumps([*stamp, key]).encode()))
    return key, data


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file so that it appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            write(file)
            file.flush()
            os.rename(file.name, path)
        except BaseException as error:
            os.unlink(file.name)
            if isinstance(error, RuntimeError):  # torch.save on a full disk
                raise OSError(str(error)) from error
            raise


def _open(path: Path) -> dict | None:
    """Map saved arrays into memory; None if there are none."""
    try:
        return torch.load(path, mmap=True, weights_only=True)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        logger.warning(f"{path} is broken and made again: {error}")
        return None


def kept(key: str | None, make: Callable[[], dict]) -> dict:
    """Return what `make` returns, tensors and plain values, mapped from the cache if possible."""
    if key is None:
        return make()
    path = cache_folder() / f"{key}.pt"
    if (found := _open(path)) is not None:
        return found
    made = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process reads, the others wait for its arrays
            if (found := _open(path)) is None:
                made = make()
                _write(path, partial(torch.save, made))
                found = _open(path)
    except OSError as error:
        logger.warning(f"checked annotations are not kept in {path.parent}: {error}")
    return found or made or make()
