"""Datasets in YOLO text format: a text file per image, a line per object.

A line is `class cx cy w h`, or `class x y x y x y ...` for outlines. Classes start at 0;
coordinates are fractions of the image width and height. Images without a text file have no objects.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from yaml import YAMLError

from dn_detr.datasets.coco_json import CocoFile, find_images, read_text
from dn_detr.datasets.image_files import image_size
from dn_detr.errors import InputError
from dn_detr.safe_yaml import read_yaml

YAML_SUFFIXES = (".yaml", ".yml")
NO_LABELS = ("classes.txt", "train.txt", "val.txt", "test.txt")
_ROUNDING = 1e-3  # tolerance beyond [0, 1], as text files have few digits


def read_class_names(path: str | Path) -> list[str]:
    """Read class names from `names` in a data.yaml (a list, or a mapping starting at 0), or from a
    text file with one name per line.
    """
    path = Path(path)
    if path.suffix not in YAML_SUFFIXES:
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]
    content = read_data_yaml(path)
    names = content.get("names")
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise InputError(f"{path} must have 'names': a list, or a mapping from 0, 1, ... to names.")
    return [str(name) for name in names]


def read_data_yaml(path: Path) -> dict:
    """Read a data.yaml; a document that is no mapping has no keys."""
    try:
        content = read_yaml(read_text(path))
    except YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    return content if isinstance(content, dict) else {}


def label_folder_of(images: Path) -> Path:
    """Guess the folder of text files: replace the last folder `images` in the path by `labels`.

    Without such a folder, text files are next to the images.
    """
    parts = list(images.parts)
    for i in reversed(range(len(parts))):
        if parts[i] == "images":
            parts[i] = "labels"
            return Path(*parts)
    return images


def label_file_of(image: Path) -> Path:
    """Return the text file of an image in the folder that `label_folder_of` guesses."""
    return label_folder_of(image.parent) / f"{image.stem}.txt"


def from_yolo(images: str | Path, class_names: list[str], labels: str | Path | None = None) -> dict:
    """Convert a YOLO dataset to the content of a COCO JSON file.

    Each file_name is relative to `images`.

    Args:
        images: folder of images.
        class_names: class names in order.
        labels: folder of text files, None for `label_folder_of(images)`.

    Raises:
        InputError: if a file is not in YOLO format; names the file and line.
    """
    images = Path(images)
    paths = find_images(images)
    labels = label_folder_of(images) if labels is None else Path(labels)
    if not labels.is_dir():
        raise InputError(f"there is no folder {str(labels)!r} with text files: specify it.")
    pairs = [(path, (labels / path.relative_to(images)).with_suffix(".txt")) for path in paths]
    content = from_pairs(pairs, class_names, images)
    _check_text_files_have_images(labels, {text_file for _, text_file in pairs})
    return content


def from_pairs(pairs: list[tuple[Path, Path]], class_names: list[str], root: Path) -> dict:
    """Convert images below `root`, each with its text file, which may be missing."""
    coco, used = CocoFile(class_names), set()
    for path, text_file in pairs:
        if text_file in used:
            raise InputError(f"{text_file} belongs to two images, one of them {path}.")
        used.add(text_file)
        width, height = image_size(path)
        coco.add_image(path.relative_to(root).as_posix(), (width, height))
        if not os.path.lexists(text_file):
            continue
        for number, line in enumerate(read_text(text_file).splitlines(), 1):
            if line.strip():
                place = f"{text_file}, line {number}"
                label, values = _parse(line, place, len(class_names))
                _add(coco, label, values, width, height)
    return coco.content


def _parse(line: str, place: str, num_classes: int) -> tuple[int, list[float]]:
    """Parse the class and coordinates of a line."""
    try:
        label, *values = map(float, line.split())
    except ValueError:
        raise InputError(f"{place}: expected numbers, got {line.strip()!r}.") from None
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise InputError(
            f"{place}: expected a class and 4 numbers (centre and size), or a class and the points "
            f"of an outline, got {len(values) + 1} numbers."
        )
    if not label.is_integer() or not 0 <= label < num_classes:
        raise InputError(f"{place}: the class must be 0 to {num_classes - 1}, got {label:g}.")
    if not all(math.isfinite(v) and -_ROUNDING <= v <= 1 + _ROUNDING for v in values):
        raise InputError(
            f"{place}: coordinates must be fractions of the image in [0, 1], not pixels, got "
            f"{line.strip()!r}."
        )
    return int(label), values


def _add(coco: CocoFile, label: int, values: list[float], width: int, height: int) -> None:
    if len(values) == 4:
        cx, cy, w, h = values
        box = (
            (cx - w / 2) * width,
            (cy - h / 2) * height,
            (cx + w / 2) * width,
            (cy + h / 2) * height,
        )
        coco.add_object(label, box)
        return
    x, y = [v * width for v in values[::2]], [v * height for v in values[1::2]]
    outline = [v for point in zip(x, y, strict=True) for v in point]
    coco.add_object(label, (min(x), min(y), max(x), max(y)), polygon=outline)


def _check_text_files_have_images(labels: Path, used: set[Path]) -> None:
    """Raise InputError for text files without an image: the folders do not match."""
    extra = [p for p in sorted(labels.rglob("*.txt")) if p not in used and p.name not in NO_LABELS]
    extra = [p for p in extra if not p.name.lower().startswith("readme")]
    if extra:
        raise InputError(
            f"{len(extra)} text files in {labels} have no image, the first is {extra[0]}."
        )
