"""Loading of datasets: check, clean and count once, then share the records with all workers."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog
from detectron2.structures import BoxMode

from dn_detr.d2.data.catalog import class_names
from dn_detr.d2.data.coco_check import check_annotations, read_json
from dn_detr.errors import InputError

logger = logging.getLogger(__name__)

ROUNDING = 0.1  # boxes that leave their image by up to this many pixels are not reported
_NUM_EXAMPLES = 3


@dataclass
class Finding:
    """Boxes with the same fault: their number, and the first few as text."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, record: dict, box) -> None:
        """Count a box of a record."""
        self.count += 1
        if len(self.examples) < _NUM_EXAMPLES:
            self.examples.append(f"{record['file_name']} [{', '.join(f'{v:g}' for v in box)}]")


@dataclass(eq=False)
class LoadedDataset:
    """A dataset ready for training or evaluation.

    Args:
        name: Name in the catalog.
        class_names: Names of the K classes.
        records: Detectron2's dataset dicts, with boxes as xyxy pixels inside their image.
        num_objects: [images] int64, boxes without crowd regions.
        class_counts: [K] int64, boxes of each class without crowd regions.
        num_crowd: Crowd regions of all images.
        no_size: Dropped boxes: size zero, negative or not finite.
        outside: Dropped boxes outside their image.
        clipped: Boxes clipped at the border of their image, as in the source.
    """

    name: str
    class_names: list[str]
    records: DatasetFromList
    num_objects: np.ndarray
    class_counts: np.ndarray
    num_crowd: int
    no_size: Finding
    outside: Finding
    clipped: Finding


def describe(no_size: Finding, outside: Finding, clipped: Finding) -> list[str]:
    """Return one line for every kind of fault that occurred."""
    kinds = (
        ("dropped    boxes with zero, negative or not finite size", no_size),
        ("dropped    boxes outside their image", outside),
        ("clipped    boxes at the border of their image", clipped),
    )
    return [
        f"{text}: {finding.count} ({', '.join(finding.examples)}"
        f"{', ...' if finding.count > len(finding.examples) else ''})"
        for text, finding in kinds
        if finding.count
    ]


def load(name: str, *, check: str = "full", with_masks: bool = False) -> LoadedDataset:
    """Load a registered dataset and clean its boxes; a second call returns the same object.

    Args:
        name: Name in the catalog.
        check: "full" checks the annotation file first, "off" does not.
        with_masks: Whether to keep segmentations.

    Raises:
        InputError: If the files are broken or do not fit each other.
    """
    if check not in ("full", "off"):
        raise InputError(f"DATASETS.CHECK must be 'full' or 'off', got {check!r}.")
    names = class_names(name)  # also refuses names that are not registered
    return _load(name, DatasetCatalog[name], tuple(names), check == "full", with_masks)


@cache
def _load(name, load_records, names, is_checked, with_masks) -> LoadedDataset:
    """Load with `load_records`, a key of the cache: a re-registered name is loaded again."""
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    if is_checked and json_file is not None and not metadata.get("is_drawn_on_first_use", False):
        check_annotations(json_file, read_json(json_file))
    try:
        records = load_records()
    except FileNotFoundError as error:
        raise InputError(f"the dataset {name!r} cannot be loaded: {error}.") from error
    if not records:
        raise InputError(f"the dataset {name!r} has no images.")
    loaded = clean(records, name=name, class_names=list(names), with_masks=with_masks)
    if not is_checked:  # otherwise the report lists them
        for line in describe(loaded.no_size, loaded.outside, loaded.clipped):
            logger.warning(f"dataset {name}: {line}")
    return loaded


def clean(records, *, name: str, class_names: list[str], with_masks: bool = False) -> LoadedDataset:
    """Drop boxes without size, clip the others at the border of their image, and count them.

    Args:
        records: Detectron2's dataset dicts, which stay unchanged. A missing image id becomes the
            index of the record.
        name: Name in the catalog.
        class_names: Names of the K classes.
        with_masks: Whether to keep segmentations.

    Raises:
        InputError: If a class is not in [0, K), or a segmentation is missing `with_masks`.
    """
    unused = {"keypoints", "score"}  # a score would mark an object as a teacher's box
    if not with_masks:
        unused.add("segmentation")
    no_size, outside, clipped = Finding(), Finding(), Finding()
    cleaned, num_objects, num_crowd = [], [], 0
    class_counts = np.zeros(len(class_names), np.int64)
    for i, record in enumerate(records):
        kept, count = [], 0
        for annotation in record.get("annotations", ()):
            annotation = {key: annotation[key] for key in annotation if key not in unused}
            if annotation.get("iscrowd", 0):
                num_crowd += 1
                kept.append(annotation)
                continue
            box, fault = fit_box(_corners(annotation), record.get("width"), record.get("height"))
            if fault is not None:
                finding = {"no size": no_size, "outside": outside, "clipped": clipped}[fault]
                finding.add(record, annotation["bbox"])
            if box is None:
                continue
            label = annotation["category_id"]
            if not 0 <= label < len(class_names):
                raise InputError(
                    f"the dataset {name!r} has the class {label} in {record['file_name']}, but "
                    f"only {len(class_names)} class names."
                )
            if with_masks and not annotation.get("segmentation"):
                raise InputError(
                    f"MODEL.MASK_ON needs a segmentation for every box, but the dataset {name!r} "
                    f"has one without in {record['file_name']}."
                )
            annotation.update(bbox=box, bbox_mode=BoxMode.XYXY_ABS)
            kept.append(annotation)
            count += 1
            class_counts[label] += 1
        cleaned.append({"image_id": i, **record, "annotations": kept})
        num_objects.append(count)
    return LoadedDataset(
        name=name,
        class_names=class_names,
        records=DatasetFromList(cleaned, copy=False),
        num_objects=np.array(num_objects),
        class_counts=class_counts,
        num_crowd=num_crowd,
        no_size=no_size,
        outside=outside,
        clipped=clipped,
    )


def _corners(annotation: dict) -> list[float]:
    """Return x0, y0, x1, y1 of an annotation's box."""
    box, mode = annotation["bbox"], annotation["bbox_mode"]
    if mode == BoxMode.XYWH_ABS:  # the usual mode; faster than a tensor for every box
        x, y, width, height = (float(value) for value in box)
        return [x, y, x + width, y + height]
    return [float(value) for value in BoxMode.convert(list(box), mode, BoxMode.XYXY_ABS)]


def fit_box(corners, width, height) -> tuple[list[float] | None, str | None]:
    """Clip a box to its image.

    Args:
        corners: x0, y0, x1, y1 in pixels.
        width: Width of the image, or None if unknown.
        height: Height of the image, or None if unknown.

    Returns:
        The clipped box, None if nothing is left; and its fault "no size", "outside", "clipped" or
        None.
    """
    x0, y0, x1, y1 = corners
    if not all(map(math.isfinite, corners)) or x1 <= x0 or y1 <= y0:
        return None, "no size"
    if width is None or height is None:
        return corners, None
    box = [max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))]
    if box[2] <= box[0] or box[3] <= box[1]:
        return None, "outside"
    moved = max(abs(new - old) for new, old in zip(box, corners, strict=True))
    return box, "clipped" if moved > ROUNDING else None
