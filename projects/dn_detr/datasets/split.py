"""A random split of a dataset into training and validation, written down to be the same again."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path

from dn_detr.datasets.cache import replacing
from dn_detr.datasets.coco_json import read_text
from dn_detr.errors import InputError

SHARE, SEED = 0.2, 0
"""Share of the images that validate, and the seed that chooses them."""


def choose(classes: dict[str, set[int]]) -> list[str]:
    """Choose images for validation so that every class gets its share.

    Rarest class first (Sechidis et al., On the stratification of multi-label data, 2011): as many
    of its images as are still missing. A class in two or more images is in both parts, unless
    the only images that could be moved hold rarer classes.

    Args:
        classes: image -> its classes.
    """
    draw = random.Random(SEED)
    images = draw.sample(sorted(classes), len(classes))
    counts = Counter(label for labels in classes.values() for label in labels)
    validates: dict[str, bool] = {}
    for label in sorted(counts, key=lambda label: (counts[label], label)):
        with_it = [image for image in images if label in classes[image]]
        wanted = max(round(SHARE * len(with_it)), int(len(with_it) > 1))
        wanted -= sum(validates.get(image, False) for image in with_it)
        for image in with_it:
            if image not in validates:
                validates[image] = wanted > 0
                wanted -= 1
    empty = [image for image in images if not classes[image]]
    validates |= {image: i < round(SHARE * len(empty)) for i, image in enumerate(empty)}
    return sorted(image for image, is_val in validates.items() if is_val)


def divide(content: dict, record: Path, fallback: Path) -> tuple[dict, dict, Path]:
    """Divide the content of a COCO file into training and validation.

    Images of the record stay where it has them; new ones are divided among themselves and added.

    Args:
        content: images, annotations and categories.
        record: file beside the data that lists the images of both parts by file_name.
        fallback: file that is used instead where `record` cannot be written.

    Returns:
        Both parts, and the file that lists them.
    """
    classes: dict[str, set[int]] = {image["file_name"]: set() for image in content["images"]}
    names = {image["id"]: image["file_name"] for image in content["images"]}
    if len(classes) < 2:
        raise InputError(f"{record.parent} has {len(classes)} images: a split needs at least two.")
    for annotation in content.get("annotations") or []:
        if annotation["image_id"] in names:
            classes[names[annotation["image_id"]]].add(annotation["category_id"])
    known = read_record(record) or read_record(fallback) or {"train": [], "val": []}
    val = set(known["val"])
    new = {name: classes[name] for name in classes if name not in val.union(known["train"])}
    if new:
        val |= set(choose(new)) if len(new) > 1 or not known["val"] else set()
        val = val & set(classes) or {min(classes)}  # all images may be of one class
        about = f"dn_detr's random split, {SHARE:.0%} for val; delete this file for a new one"
        parts = {"train": sorted(set(classes) - val), "val": sorted(val)}
        text = json.dumps({"about": about, "seed": SEED, **parts}, indent=1)
        try:
            write_whole(record, text)
        except OSError:  # the data are on a read-only disk
            write_whole(fallback, text)
    train, validation = (
        _part(content, {i for i, name in names.items() if (name in val) == is_val})
        for is_val in (False, True)
    )
    if not train["images"] or not validation["images"]:
        raise InputError(f"{record} leaves no images for train or val: delete it for a new split.")
    return train, validation, record if record.is_file() else fallback


def _part(content: dict, ids: set) -> dict:
    images = [image for image in content["images"] if image["id"] in ids]
    annotations = [a for a in (content.get("annotations") or []) if a["image_id"] in ids]
    return {**content, "images": images, "annotations": annotations}


def read_record(path: Path) -> dict | None:
    """Read a written split; None if there is none."""
    if not path.is_file():
        return None
    try:
        record = json.loads(read_text(path))
        if all(isinstance(name, str) for key in ("train", "val") for name in record[key]):
            return record
        reason = "it must list file names under train and val"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise InputError(f"the split {path} cannot be read ({reason}): correct or delete it.")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, os.getpid()) as file:
        file.write(text.encode())
