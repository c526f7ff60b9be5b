"""Checks of a dataset's image files before a training, remembered between runs."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.pool import ThreadPool

from tqdm import tqdm

from dn_detr.d2.data.mapper import local_path
from dn_detr.datasets.cache import cache_folder
from dn_detr.datasets.image_files import fault_of
from dn_detr.errors import InputError

logger = logging.getLogger(__name__)

WAIT = 20.0
"""Seconds that the start of a run waits for a check of the image files of one dataset."""

MOST_REMEMBERED = 2_000_000
"""Sound images in the cache, about 200 bytes each; the oldest are forgotten."""

_NUM_NAMES = 10  # most faults that are listed
_MOST_SAID = 100  # and logged one by one
_PART = 4096  # images after which results are kept, should the run end
_CHUNK = 16  # images that a thread or process gets at once
_TAIL = 16384  # bytes that tell nearly all files of one size apart


def check_image_files(
    records, dataset: str, *, bad_images: str, most: int, is_for_training: bool = True
) -> None:
    """Check the image files of a dataset, see `find_faults`.

    What takes more than WAIT seconds goes on in a thread, which logs further faults; a training
    ends when it reads such an image.

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
    faults: list[str] = []

    def check(is_late: Callable[[], bool]) -> None:
        def tell(fault: str) -> None:
            faults.append(fault)
            if is_late() and len(faults) <= _MOST_SAID:
                logger.warning(f"dataset {dataset!r}: {fault}")

        find_faults(records, tell=tell)

    in_time(check, f"the image files of the dataset {dataset!r} are checked")
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


def in_time(work: Callable[[Callable[[], bool]], object], what: str) -> None:
    """Do `work`, raising its errors; after WAIT seconds a thread goes on with it.

    Args:
        work: Gets a function that tells whether it has become late.
        what: A clause for the log.
    """
    late, future = threading.Event(), Future()

    def run() -> None:
        try:
            future.set_result(work(late.is_set))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # a daemon does not delay the exit
    try:
        future.result(WAIT)
        return
    except TimeoutError:
        if future.done():
            raise
    late.set()
    logger.info(f"{what} while the run goes on, as this takes more than {WAIT:g} s")
    future.add_done_callback(lambda done: logger.info(f"{what}: {done.exception() or 'done'}"))


def find_faults(
    records,
    *,
    decodes: bool = False,
    shows_progress: bool = False,
    tell: Callable[[str], object] = lambda fault: None,
) -> dict[int, str]:
    """Check all image files by their headers and ends, or decode them in parallel.

    Sound images are remembered in the cache folder by path, size and time of change, and not opened
    again.

    Args:
        records: Dataset dicts; "width" and "height" may be missing.
        decodes: Whether to decode the pixels.
        shows_progress: Whether to draw a progress bar.
        tell: Called with each fault when it is found.

    Returns:
        Index of a record -> a sentence on its image.
    """
    paths, sizes, faults = [], [], {}
    for record in records:
        size = (record.get("width"), record.get("height"))
        paths.append(local_path(record["file_name"]))
        sizes.append(None if None in size else size)
    keys = [os.fsencode(os.path.abspath(path)) for path in paths]
    with ThreadPool(8) as threads, _remembered() as database:
        states = threads.map(_state, paths, chunksize=64)
        rows = database.execute(
            "SELECT * FROM sound WHERE path BETWEEN ? AND ? AND decoded >= ?",
            (min(keys, default=b""), max(keys, default=b""), decodes),
        )
        known = {path: (state, (width, height)) for path, state, _, width, height in rows}
        jobs, todo = [], []
        for i, (path, key, size, state) in enumerate(zip(paths, keys, sizes, states, strict=True)):
            known_state, known_size = known.get(key, (None, None))
            if state != known_state or size not in (None, known_size):
                jobs.append((path, size, decodes))
                todo.append(i)
        # Pillow decodes one image at a time in a process, but waits for files in threads.
        with contextlib.ExitStack() as stack:
            if decodes and jobs:
                processes = stack.enter_context(ProcessPoolExecutor())
                found = processes.map(fault_of, jobs, chunksize=_CHUNK)
            else:
                found = threads.imap(fault_of, jobs, _CHUNK)
            is_quiet = None if shows_progress else True  # None: only on a terminal
            bar = tqdm(found, total=len(jobs), unit="image", disable=is_quiet)
            rows = []
            for i, result in zip(todo, bar, strict=True):
                if isinstance(result, str):
                    faults[i] = result
                    tell(result)
                    continue
                rows.append((keys[i], states[i], decodes, *result))
                if len(rows) == _PART:
                    _remember(database, rows)
        _remember(database, rows)
    return faults


def _state(path: str) -> str:
    """Return size and time of change of a file, "" if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def _remember(database: sqlite3.Connection, rows: list[tuple]) -> None:
    """Keep sound images and forget the oldest; without effect on a full or locked disk."""
    if rows:
        with contextlib.suppress(sqlite3.Error):
            database.executemany("REPLACE INTO sound VALUES (?, ?, ?, ?, ?)", rows)
            last = "(SELECT max(rowid) FROM sound)"
            database.execute(f"DELETE FROM sound WHERE rowid <= {last} - {MOST_REMEMBERED}")
            database.commit()
        rows.clear()


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
        database = sqlite3.connect(folder / "images.sqlite", timeout=10)
        database.execute(table)
    except (OSError, sqlite3.Error) as error:
        logger.info(f"checks of images are not remembered: {error}")
        database = sqlite3.connect(":memory:")
        database.execute(table)
    with contextlib.closing(database):
        yield database


def equal_files(paths: list[str], most: int | None = None) -> list[list[int]]:
    """Group the files that have the same path or content; files that cannot be read have none.

    Args:
        paths: Files.
        most: Of more files only the paths are compared, and nothing is read.

    Returns:
        Lists of at least two indices.
    """
    paths = [local_path(path) for path in paths]
    groups = {(): list(range(len(paths)))}
    keys = [_size, lambda path: _digest(path, _TAIL), _digest]
    with ThreadPool(8) as pool:
        for key in keys if most is None or len(paths) <= most else [os.path.abspath]:
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
