"""Checks of the image files of a dataset before training."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from dn_detr.errors import InputError

MAX_OPENED_IMAGES = 20_000  # larger datasets: check only that the image files exist
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # raised by Pillow
_EXIF_ORIENTATION = 274
_EXIF_TURNED = (5, 6, 7, 8)  # orientations that swap width and height


def reason(error: Exception) -> str:
    """Return why an image cannot be read, as part of a sentence."""
    if isinstance(error, UnidentifiedImageError):  # its text names only a Python object
        return "unknown image format"
    return str(error).rstrip(".")


def check_image_files(records: list[dict], dataset: str) -> None:
    """Check that all image files exist and, in datasets up to MAX_OPENED_IMAGES, can be opened.

    Opened files must have the width and height of their record. Only headers are read, so damaged
    pixel data is found at loading time.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        missing = [
            record["file_name"]
            for record, exists in zip(
                records, pool.map(_exists, records, chunksize=64), strict=True
            )
            if not exists
        ]
        if missing:
            raise InputError(
                f"{len(missing)} of the {len(records)} image files of the dataset {dataset!r} do "
                f"not exist, the first is {missing[0]}: check the image folder."
            )
        if len(records) > MAX_OPENED_IMAGES:
            return
        faults = [fault for fault in pool.map(_fault, records, chunksize=64) if fault]
    if faults:
        raise InputError(
            f"{len(faults)} of the {len(records)} images of the dataset {dataset!r} cannot be used,"
            f" the first is {faults[0]}."
        )


def _exists(record: dict) -> bool:
    return PathManager.isfile(record["file_name"])


def _fault(record: dict) -> str | None:
    """Return what is wrong with the header of a record's image, or None."""
    try:
        with PathManager.open(record["file_name"], "rb") as file, Image.open(file) as image:
            width, height = image.size
            if image.getexif().get(_EXIF_ORIENTATION) in _EXIF_TURNED:
                width, height = height, width
    except UNREADABLE as error:
        return f"{record['file_name']}, which cannot be read ({reason(error)})"
    wanted = (record.get("width", width), record.get("height", height))
    if wanted != (width, height):
        return (
            f"{record['file_name']}, which has {width}x{height} pixels, but its annotations say "
            f"{wanted[0]}x{wanted[1]}"
        )
    return None
