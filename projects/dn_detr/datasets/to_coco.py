"""Datasets of other formats as files in COCO format; images are not copied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dn_detr.datasets.folder import read_folder
from dn_detr.datasets.voc import from_voc
from dn_detr.datasets.yolo import from_yolo, read_class_names


def convert_folder(folder: Path, output: Path, *, images: str = "", annotations: str = "") -> str:
    """Write a json file for each split of a folder, whose layout is recognised.

    Args:
        folder: Dataset.
        output: Folder of the json files.
        images: See `read_folder`, like annotations.
        annotations: See `read_folder`.

    Returns:
        A sentence on the result.
    """
    found, entries = read_folder(folder, images, annotations), []
    output.mkdir(parents=True, exist_ok=True)
    for split, (json_file, image_root) in found.files.items():
        target = output / f"{split}.json"
        shutil.copyfile(json_file, target)
        entries.append([f"my_{split}", str(target), image_root])
    return f'{found.sentence}. Use it as\n  DATASETS.COCO_FORMAT "{entries}"'


def convert_yolo(images: Path, output: Path, names: Path, labels: Path | None = None) -> str:
    """Write a json file for a folder of images and one of YOLO's text files; see `from_yolo`."""
    return _write(from_yolo(images, read_class_names(names), labels), output, images)


def convert_voc(
    folder: Path,
    output: Path,
    *,
    split: str | None = None,
    names: Path | None = None,
    first_pixel: int = 1,
) -> str:
    """Write a json file for a folder with Annotations and JPEGImages; see `from_voc`."""
    classes = read_class_names(names) if names else None
    content = from_voc(folder, split=split, class_names=classes, first_pixel=first_pixel)
    return _write(content, output, folder / "JPEGImages")


def _write(content: dict, output: Path, images: Path) -> str:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content), encoding="utf-8")
    return (
        f"wrote {output}: {len(content['images'])} images, {len(content['annotations'])} "
        f"objects, {len(content['categories'])} classes. Use it as\n"
        f"  DATASETS.COCO_FORMAT \"[['my_data', '{output}', '{images}']]\""
    )
