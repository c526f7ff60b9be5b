"""Write annotation files in COCO format."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dn_detr.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")


class CocoFile:
    """Collect images and objects into `content`, the content of a COCO JSON file.

    Ids start at 1; categories follow the order of `class_names`.
    """

    def __init__(self, class_names: list[str]):
        repeated = {name for name in class_names if class_names.count(name) > 1}
        if repeated or not class_names:
            reason = f"{min(repeated)!r} is repeated" if repeated else "there are none"
            raise InputError(f"class names must be unique and not empty, but {reason}.")
        self.content = {
            "images": [],
            "annotations": [],
            "categories": [{"id": i, "name": name} for i, name in enumerate(class_names, 1)],
        }

    def add_image(self, file_name: str, size: tuple[int, int]) -> None:
        """Add an image of size (width, height) in pixels; the following objects belong to it."""
        images = self.content["images"]
        width, height = size
        entry = {"id": len(images) + 1, "file_name": file_name, "width": width, "height": height}
        images.append(entry)

    def add_object(
        self, label: int, box_xyxy_px, *, is_crowd: bool = False, polygon: list[float] | None = None
    ) -> None:
        """Add an object to the last image.

        Args:
            label: class index in [0, K).
            box_xyxy_px: (left, top, right, bottom) in pixels.
            polygon: outline (x, y, x, y, ...) in pixels, if known.
        """
        left, top, right, bottom = map(float, box_xyxy_px)
        annotations = self.content["annotations"]
        annotation = {
            "id": len(annotations) + 1,
            "image_id": len(self.content["images"]),
            "category_id": label + 1,
            "bbox": [left, top, right - left, bottom - top],
            "area": (right - left) * (bottom - top),
            "iscrowd": int(is_crowd),
        }
        if polygon is not None:
            annotation["segmentation"] = [polygon]
            annotation["area"] = _area(polygon)
        annotations.append(annotation)


def _area(polygon: list[float]) -> float:
    """Polygon area by the shoelace formula."""
    x, y = polygon[::2], polygon[1::2]
    twice = sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))
    return abs(twice) / 2


def read_bytes(path: Path, most: int = -1) -> bytes:
    """Read a file, or its first bytes; InputError if that fails or might never end."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO, or a link to a device
            raise InputError(f"{path} is not a regular file.")
        with open(path, "rb") as file:
            return file.read(most)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without byte order mark; InputError as in `read_bytes`."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}.") from error


def find_images(folder: Path) -> list[Path]:
    """Find all image files in a folder and its subfolders, sorted by path."""
    if not folder.is_dir():
        raise InputError(f"there is no image folder {str(folder)!r}.")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise InputError(f"the folder {str(folder)!r} contains no images.")
    return found
