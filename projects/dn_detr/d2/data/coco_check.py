"""Checks of a COCO json file before Detectron2 reads it.

Detectron2 and pycocotools fail on a broken file with a bare traceback or an assertion, or do not
notice. Every function here raises an InputError with one sentence: the file and its fault.
"""

from __future__ import annotations

import json
import os

from detectron2.utils.file_io import PathManager

from dn_detr.errors import InputError


def read_json(json_file: str) -> dict:
    """Parse an annotation file."""
    try:
        with PathManager.open(json_file, "r", encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise InputError(
            f"the annotation file {json_file} does not exist (working directory {os.getcwd()}): "
            "for COCO (https://cocodataset.org/#download) `export DETECTRON2_DATASETS=FOLDER`, "
            "where FOLDER holds coco/; for custom data check the path; to try without any data use "
            "`--config-file configs/quick/dn_deformable.yaml`, which draws its own."
        ) from None
    except OSError as error:
        raise InputError(f"the annotation file {json_file} cannot be read: {error}.") from None
    except ValueError as error:  # not json, cut off, or not UTF-8
        raise InputError(f"{json_file} is not a valid json file: {error}.") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{json_file} is not in COCO format: it must hold an object with 'images', "
            f"'annotations' and 'categories', got a {type(content).__name__}."
        )
    return content


def _list_of(content: dict, key: str, json_file: str, needs: dict[str, type | tuple]) -> list[dict]:
    """Return the list content[key] after checking the keys and value types of its entries."""
    entries = content.get(key)
    if not isinstance(entries, list):
        raise InputError(f"{json_file} is not in COCO format: it has no list {key!r}.")
    for i, entry in enumerate(entries):
        for needed, kind in needs.items():
            if not isinstance(entry, dict) or needed not in entry:
                raise InputError(f"{json_file}: entry {i} of {key!r} has no {needed!r}.")
            value = entry[needed]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(
                    f"{json_file}: entry {i} of {key!r} has an invalid {needed!r}: {value!r}."
                )
    return entries


def _repeated(values: list):
    """Return the first value that occurs twice, or None."""
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def check_categories(json_file: str, content: dict) -> dict[int, str]:
    """Return category id -> class name, sorted by id like the model's classes."""
    categories = _list_of(content, "categories", json_file, {"id": int, "name": str})
    if not categories:
        raise InputError(f"{json_file} has no 'categories'.")
    repeated = _repeated([category["id"] for category in categories])
    if repeated is not None:
        raise InputError(f"{json_file}: the category id {repeated} is used twice.")
    return {entry["id"]: entry["name"] for entry in sorted(categories, key=lambda x: x["id"])}


def check_annotations(json_file: str, content: dict) -> None:
    """Check everything that Detectron2 needs to load the file.

    A missing key 'annotations' is accepted: hidden test sets have none.
    """
    categories = check_categories(json_file, content)
    needs = {"id": (int, str), "file_name": str, "width": (int, float), "height": (int, float)}
    images = _list_of(content, "images", json_file, needs)
    if not images:
        raise InputError(f"{json_file} has no images.")
    for image in images:
        if image["width"] < 1 or image["height"] < 1:
            raise InputError(
                f"{json_file}: the image {image['file_name']} must be at least 1x1 pixels, got "
                f"{image['width']}x{image['height']}."
            )
    image_ids = [image["id"] for image in images]
    if len({type(image_id) for image_id in image_ids}) > 1:
        raise InputError(f"{json_file}: image ids must be all numbers or all strings, got both.")
    repeated = _repeated(image_ids)
    if repeated is not None:
        raise InputError(f"{json_file}: the image id {repeated} is used twice.")
    if "annotations" not in content:
        return
    needs = {"id": int, "image_id": (int, str), "category_id": int, "bbox": list}
    annotations = _list_of(content, "annotations", json_file, needs)
    image_ids = set(image_ids)
    for annotation in annotations:
        name = f"{json_file}: annotation {annotation['id']}"
        if annotation["image_id"] not in image_ids:
            raise InputError(
                f"{name} has image_id {annotation['image_id']}, which is not in 'images'."
            )
        if annotation["category_id"] not in categories:
            raise InputError(
                f"{name} has category_id {annotation['category_id']}, which is not in 'categories'."
            )
        box = annotation["bbox"]
        if len(box) != 4 or not all(type(value) in (int, float) for value in box):
            raise InputError(f"{name} must have a bbox [x, y, width, height], got {box}.")
        if annotation.get("ignore", 0):
            raise InputError(f"{name} has 'ignore', which is not supported: use 'iscrowd'.")
    repeated = _repeated([annotation["id"] for annotation in annotations])
    if repeated is not None:
        raise InputError(f"{json_file}: the annotation id {repeated} is used twice.")


def read_results(results_file: str, content: dict) -> list[dict]:
    """Read detections in COCO's result format and check them against a parsed annotation file."""
    try:
        with PathManager.open(results_file, "r", encoding="utf-8") as file:
            results = json.load(file)
    except FileNotFoundError:
        raise InputError(f"the results {results_file} do not exist.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"the results {results_file} cannot be read: {error}.") from error
    if not isinstance(results, list) or not results:
        raise InputError(f"{results_file} must hold a list of at least one result.")
    needs = {"image_id": (int, str), "category_id": int, "bbox": list, "score": (int, float)}
    _list_of({"results": results}, "results", results_file, needs)
    for key, entries in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in content[entries]}
        unknown = next((result[key] for result in results if result[key] not in known), None)
        if unknown is not None:
            raise InputError(
                f"{results_file} has the {key} {unknown!r}, which is not in the annotation file."
            )
    return results
