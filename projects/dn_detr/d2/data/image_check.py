"""Checks of a dataset's image files before a training, remembered between runs."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sqlite3
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

from tqdm import tqdm

from dn_detr.d2.data.mapper import local_path
from dn_detr.datasets.cache import cache_folder
from dn_detr.datasets.image_files import fault_of
from dn_detr.errors import InputError

logger = logging.getLogger(__name__)

_NUM_NAMES = 10  # most faults that are listed
_MANY = 5000  # images whose check is shown by a progress bar on a terminal in any case
_PART = 1024  # files that a thread looks at together
_TAIL = 16384  # bytes that tell nearly all files of one size apart


def check_image_files(
    records, dataset: str, *, bad_images: str, most: int, is_for_training: bool = True
) -> None:
    """Check the image files of a dataset, see `find_faults`.

    Args:
        records: Dataset dicts.
        dataset: Name for messages.
        bad_images: DATALOADER.BAD_IMAGES. With "skip", and in a dataset for evaluation, faults are
            a warning.
        most: DATALOADER.MAX_BAD_IMAGES; more faults are an error in any case.
        is_for_training: Whether a training reads the images.

    Raises:
        InputError: If images cannot be used.
    """
    faults = list(find_faults(records).values())
    if not faults:
        return
    start = f"{len(faults)} of the {len(records)} images of the dataset {dataset!r} cannot be used"
    is_error = (bad_images == "stop" and is_for_training) or len(faults) > most
    if is_error or len(faults) == len(records):
        raise InputError(
            f"{start} (is its image folder right? DATALOADER.BAD_IMAGES skip replaces up to "
            f"DATALOADER.MAX_BAD_IMAGES {most}): {faults[0]}"
        )
    more = ["..."] if len(faults) > _NUM_NAMES else []
    logger.warning("\n  ".join([f"{start}:", *faults[:_NUM_NAMES], *more]))


def find_faults(records, *, decodes: bool = False, shows_progress: bool = False) -> dict[int, str]:
    """Check all image files by their headers and ends, or decode them in parallel.

    Sound images are remembered in the cache folder by path, size and time of change, and not opened
    again.

    Args:
        records: Dataset dicts; "width" and "height" may be missing.
        decodes: Whether to decode the pixels.
        shows_progress: Whether to draw a progress bar.

    Returns:
        Index of a record -> a sentence on its image.
    """
    paths, sizes = [], []
    for record in records:
        size = (record.get("width"), record.get("height"))
        paths.append(local_path(record["file_name"]))
        sizes.append(None if None in size else size)
    with ThreadPoolExecutor(8) as threads, _remembered() as database:
        parts = [paths[i : i + _PART] for i in range(0, len(paths), _PART)]
        states = [state for part in threads.map(_states, parts) for state in part]
        rows = database.execute("SELECT * FROM sound WHERE decoded >= ?", (decodes,))
        known = {path: (state, (width, height)) for path, state, _, width, height in rows}
        jobs, todo = [], []
        for i, (path, size, state) in enumerate(zip(paths, sizes, states, strict=True)):
            known_state, known_size = known.get(_key(path), (None, None))
            if state != known_state or size not in (None, known_size):
                jobs.append((path, size, decodes))
                todo.append(i)
        # Pillow decodes one image at a time in a process, but waits for files in threads.
        with ProcessPoolExecutor() if decodes and jobs else threads as pool:
            found = pool.map(fault_of, jobs, chunksize=16)
            # disable=None: only on a terminal.
            is_quiet = None if shows_progress or len(jobs) > _MANY else True
            bar = tqdm(found, total=len(jobs), unit="image", disable=is_quiet)
            results = dict(zip(todo, bar, strict=True))
        with contextlib.suppress(sqlite3.Error):  # a full disk, or a locked one: checked again
            database.executemany(
                "REPLACE INTO sound VALUES (?, ?, ?, ?, ?)",
                [
                    (_key(paths[i]), states[i], decodes, *result)
                    for i, result in results.items()
                    if not isinstance(result, str)
                ],
            )
            database.commit()
    return {i: result for i, result in results.items() if isinstance(result, str)}


def _key(path: str) -> bytes:
    return os.fsencode(os.path.abspath(path))


def _states(paths: list[str]) -> list[str]:
    """Return size and time of change of every file, "" if there is none."""
    states = []
    for path in paths:
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            states.append("")
        else:
            states.append(f"{status.st_size} {status.st_mtime_ns}")
    return states


@contextlib.contextmanager
def _remembered():
    """Open the database of sound images; one in memory where the cache folder cannot be used."""
    table = (
        "CREATE TABLE IF NOT EXISTS sound (path BLOB PRIMARY KEY, state TEXT, decoded INTEGER, "
        "width INTEGER, height INTEGER)"
    )
    database = None
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(folder / "images.sqlite", timeout=60)
        database.execute(table)
    except (OSError, sqlite3.Error) as error:
        logger.info(f"checks of images are not remembered: {error}")
        database = sqlite3.connect(":memory:")
        database.execute(table)
    with contextlib.closing(database):
        yield database


def equal_files(paths: list[str]) -> list[list[int]]:
    """Group the files that have the same path or content; files that cannot be read have none.

    Returns:
        Lists of at least two indices.
    """
    paths = [local_path(path) for path in paths]
    groups = {(): list(range(len(paths)))}
    with ThreadPoolExecutor(8) as pool:
        for key in (_size, lambda path: _digest(path, _TAIL), _digest):
            parts = defaultdict(list)
            members = [(group, i) for group, part in groups.items() for i in part]
            values = pool.map(key, [paths[i] for _, i in members], chunksize=64)
            for (group, i), value in zip(members, values, strict=True):
                if value is not None:
                    parts[(*group, value)].append(i)
            groups = {group: part for group, part in parts.items() if len(part) > 1}
    return list(groups.values())


def _size(path: str) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


def _digest(path: str, tail: int | None = None) -> bytes | None:
    """Hash a file, or only its last `tail` bytes; None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            if tail is not None:
                file.seek(max(0, os.path.getsize(path) - tail))
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None
