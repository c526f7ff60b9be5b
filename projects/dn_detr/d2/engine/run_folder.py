"""The output folder of a training: its lock, its checkpoints, earlier runs."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import BinaryIO

from dn_detr.datasets.cache import UNFINISHED
from dn_detr.errors import InputError

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"
"""File with the name of the newest checkpoint, as Detectron2 has it."""

_LOG_FILES = ("metrics.json", "events.*", "log.txt*", "wandb_run.txt", "inference", "ema")
"""What a new run would continue or mix with its own."""


def iteration_of(path: str | Path) -> int | None:
    """Return the iteration in the name of a periodic checkpoint, None for other files."""
    match = re.fullmatch(r"model_(\d{7,})\.pth", os.path.basename(path))
    return int(match[1]) if match else None


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Return the checkpoints that `--resume` may continue from, newest first.

    The one that `last_checkpoint` names is the first, whatever its age.
    """
    folder = Path(folder)
    names = [p for p in folder.glob("model_*.pth") if iteration_of(p) is not None]
    found = [p for p in (*names, folder / "model_final.pth") if p.is_file()]
    last = folder / LAST
    try:
        last = folder / last.read_text().strip() if last.is_file() else None
        if last is not None and last.is_file() and last not in found:
            found.append(last)
    except (OSError, ValueError):  # no text, or no possible name
        last = None
    return sorted(found, key=lambda p: (p == last, p.stat().st_mtime_ns), reverse=True)


def newest_checkpoint(folder: str | Path) -> str:
    """Return the newest checkpoint that is not damaged, "" if there is none.

    Raises:
        InputError: If all are damaged.
    """
    found = checkpoints_in(folder)
    for path in found:
        if is_intact(path):
            return str(path)
        logger.warning(f"the checkpoint {path} is damaged: trying the one before it")
    if found:
        raise InputError(
            f"all checkpoints in {str(folder)!r} are damaged, so --resume cannot continue: start "
            "anew with --overwrite or in another OUTPUT_DIR."
        )
    return ""


def is_intact(path: Path) -> bool:
    """Whether a file of `torch.save` is complete and has the checksums that it was written with."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # damaged files may raise any exception
        return False


def remove_old_checkpoints(folder: str | Path, iteration: int, *, newest: int, every: int) -> None:
    """Remove periodic checkpoints up to that of `iteration`, which was just written.

    Args:
        folder: OUTPUT_DIR.
        iteration: Iteration in the name of the last checkpoint; later ones are not touched.
        newest: How many to keep; 0 keeps all.
        every: Those at multiples of so many iterations stay as well; 0: no others.
    """
    periodic = {iteration_of(p): p for p in checkpoints_in(folder)}
    past = sorted(i for i in periodic if i is not None and i <= iteration)
    for i in past[:-newest] if newest else []:
        if not every or (i + 1) % every:
            periodic[i].unlink(missing_ok=True)


def lock(folder: str | Path) -> BinaryIO:
    """Lock the folder of a training until the file is closed or the process has ended.

    A record lock, which, unlike that of `flock`, the workers of a killed process do not hold on to.

    Raises:
        InputError: If another process trains in it.
        OSError: If nothing can be written there.
    """
    file = open(Path(folder, ".lock"), "ab+")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read(20).decode(errors="replace")
        file.close()
        raise InputError(
            f"another training, process {owner or 'unknown'}, is writing to OUTPUT_DIR "
            f"{str(folder)!r}: wait for its end, or name another OUTPUT_DIR."
        ) from error
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error}): start no second training in it")
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    file.flush()
    return file


def clear_folder(folder: str | Path, *, resume: bool, overwrite: bool, weights: str) -> str:
    """Clear what an earlier run in this folder has left, under its lock.

    Files that a crash left unfinished go. Without `resume`, checkpoints of the earlier run are an
    error or, with `overwrite`, go; its metrics, plots and logs move to "earlier_<n>".

    Args:
        folder: OUTPUT_DIR.
        resume: Whether the earlier run goes on.
        overwrite: Whether its checkpoints may be deleted.
        weights: MODEL.WEIGHTS of the new training.

    Returns:
        A sentence for the log, or "".

    Raises:
        InputError: If a new training would overwrite checkpoints.
    """
    folder = Path(folder)
    for path in folder.glob(f"*{UNFINISHED}*"):
        path.unlink()
    if resume:
        return ""
    kept = [p for p in (*checkpoints_in(folder), folder / "model_best.pth") if p.exists()]
    if kept and not overwrite:
        raise InputError(
            f"OUTPUT_DIR {str(folder)!r} holds checkpoints of another training "
            f"({kept[0].name} and others), which this one would overwrite: continue it with "
            "--resume, name another OUTPUT_DIR, or discard it with --overwrite."
        )
    if any(os.path.exists(weights) and path.samefile(weights) for path in kept):
        raise InputError(
            f"--overwrite would delete MODEL.WEIGHTS {weights!r}: name another OUTPUT_DIR."
        )
    for path in (*kept, folder / LAST):
        path.unlink(missing_ok=True)
    if not (folder / "metrics.json").exists():
        return ""
    number = 1 + sum(1 for _ in folder.glob("earlier_*"))
    aside = folder / f"earlier_{number}"
    aside.mkdir()
    for pattern in _LOG_FILES:
        for path in folder.glob(pattern):
            shutil.move(path, aside)
    return f"moved metrics, plots and logs of an earlier run to {aside}"
