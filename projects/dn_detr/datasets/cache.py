"""The folder for what can be made or fetched again; files that appear as a whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MOST_BYTES = 10 << 30
"""Size of the folder, beyond which `evict` removes what was not used for longest."""

UNFINISHED = ".unfinished"
"""Part of the name of a file while it is written."""


def cache_folder() -> Path:
    """Return DN_DETR_CACHE, else dn_detr in the user's cache; it need not exist."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("DN_DETR_CACHE") or f"{user}/dn_detr").expanduser()


def evict(newest: Path) -> None:
    """Remove arrays and converted datasets, oldest first but never `newest`, beyond MOST_BYTES.

    Processes that have mapped a removed file keep its content.
    """
    found = []
    for path in (*cache_folder().glob("*.pt*"), *cache_folder().glob("folder_*")):
        with contextlib.suppress(OSError):  # another process removes it
            files = [*path.iterdir()] if path.is_dir() else [path]
            found.append((path.stat().st_mtime_ns, sum(f.stat().st_size for f in files), path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total > MOST_BYTES and path != newest:
            total -= size
            shutil.rmtree(path, ignore_errors=True)
            for file in (path, path.with_suffix(".lock")):
                with contextlib.suppress(OSError):
                    file.unlink()


@contextlib.contextmanager
def replacing(path: str | Path, mark: object = "") -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends, on disk by then.

    After an error, also a crash of the machine, `path` is as before.

    Args:
        path: The file.
        mark: Tells processes apart that may write it at the same time.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}{UNFINISHED}{mark}")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name
    finally:
        os.close(folder)
