"""Detectron2's dataset dicts: made from checked arrays, and checked where a function gives them."""

from __future__ import annotations

import operator
import os
import pickle
from dataclasses import replace

import msgspec
import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from torch.utils.data import Dataset

from dn_detr.d2.data import ground_truth as schema
from dn_detr.d2.data.ground_truth import GroundTruth, Texts, decode, image_text, judge
from dn_detr.errors import InputError, quoted


class Records(Dataset):
    """Detectron2's dataset dicts, made from arrays when they are asked for.

    Boxes are xyxy pixels. Only with masks do annotations have a segmentation.

    Args:
        truth: Checked annotations.
        folder: Folder of the images; "" if file names are paths.
        with_masks: Whether to add outlines, which must be checked.
        originals: Dicts whose further keys are kept, if any.
    """

    def __init__(
        self,
        truth: GroundTruth,
        folder: str = "",
        *,
        with_masks: bool = False,
        originals: list[dict] | None = None,
    ):
        self.truth, self.folder, self.with_masks = truth, folder, with_masks
        self.originals = self.first_entries = None
        if originals is not None:
            try:
                self.originals = DatasetFromList(originals, copy=False)
            except (AttributeError, TypeError, pickle.PicklingError) as error:
                raise InputError(f"{truth.source} cannot be pickled: {quoted(error)}.") from error
            counts = [len(record.get("annotations") or ()) for record in originals]
            self.first_entries = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return len(self.truth)

    def image(self, i: int) -> dict:
        """Return a record without its annotations."""
        image = self.truth.image(i)
        name = image["file_name"]
        image["file_name"] = os.path.join(self.folder, name)
        if "\\" in name and not PathManager.isfile(image["file_name"]):  # written on Windows
            image["file_name"] = os.path.join(self.folder, name.replace("\\", "/"))
        return image

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(i)
        truth, record = self.truth, self.image(i)
        here = range(*truth.starts[i : i + 2].tolist())
        boxes = truth.corners(i).tolist()
        annotations = [
            {
                "iscrowd": int(truth.is_crowd[n]),
                "bbox": box,
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": int(truth.labels[n]),
                **({"segmentation": truth.outline(n)} if self.with_masks else {}),
            }
            for n, box in zip(here, boxes, strict=True)
        ]
        if self.originals is None:
            return {**record, "annotations": annotations}
        original = self.originals[i]
        unused = {"score", "segmentation"}  # a score would mark an object as a teacher's box
        for n, annotation in zip(here, annotations, strict=True):
            given = original["annotations"][truth.entries[n] - self.first_entries[i]]
            further = {k: given[k] for k in given if k not in unused}
            annotation |= further | annotation
        return {**original, **record, "annotations": annotations}


class _Dict(msgspec.Struct):
    """A dataset dict of Detectron2."""

    file_name: schema.Name
    image_id: schema.Id
    annotations: list[schema.Annotation]
    width: schema.Side | None = None
    height: schema.Side | None = None


def from_dicts(
    dicts: list[dict], source: str, class_names: list[str], category_ids: list[int | str]
) -> GroundTruth:
    """Check Detectron2's dataset dicts, which stay unchanged; a missing image id is the index.

    Args:
        dicts: What a function of Detectron2's catalog returns.
        source: Name of the dataset, for messages.
        class_names: [K].
        category_ids: [K], ids for result files.

    Raises:
        InputError: If they are not of Detectron2's form, or a class is not in [0, K).
    """
    images, texts, annotations = [], [], []
    for i, record in enumerate(dicts):
        where = f"{source}: dict {i}"
        if not isinstance(record, dict):
            raise InputError(f"{where} must be a dict, got {quoted(record)}.")
        given = {key: record[key] for key in ("width", "height") if record.get(key) is not None}
        given |= {"file_name": record.get("file_name"), "image_id": record.get("image_id", i)}
        try:
            objects = [_as_coco(a, i, class_names) for a in record.get("annotations") or ()]
            text = msgspec.json.encode({**given, "annotations": objects}, enc_hook=_as_json)
        except (TypeError, ValueError, KeyError, OverflowError, RuntimeError) as error:
            file_name = quoted(record.get("file_name"))
            raise InputError(f"{where} ({file_name}) is not usable: {quoted(error)}.") from error
        checked = decode(text, _Dict, where)
        is_sized = checked.width is not None and checked.height is not None
        size = (checked.width, checked.height) if is_sized else (np.inf, np.inf)
        images.append(schema.Image(i, checked.file_name, *size))
        texts.append(image_text(images[-1], checked.image_id))
        annotations += checked.annotations
    categories = [schema.Category(k, name) for k, name in enumerate(class_names)]
    has_annotations = any("annotations" in record for record in dicts)
    file = schema.CocoFile(images, categories, annotations if has_annotations else None)
    return replace(judge(file, source), images=Texts.of(texts), category_ids=category_ids)


def _as_coco(annotation: dict, image: int, class_names: list[str]) -> dict:
    """Return an annotation of a dataset dict as one of a COCO file."""
    box, mode = np.asarray(annotation["bbox"]), BoxMode(annotation["bbox_mode"])
    if mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        raise ValueError(f"bbox_mode must be XYXY_ABS or XYWH_ABS, got {mode!s}")
    if box.shape != (4,) or box.dtype.kind not in "iuf" or not np.isfinite(box).all():
        raise ValueError(f"a bbox must be 4 finite numbers, got {quoted(annotation['bbox'])}")
    label = operator.index(annotation["category_id"])
    if not 0 <= label < len(class_names):
        raise ValueError(f"it has the class {label}, but there are {len(class_names)} class names")
    box = box.astype(np.float64)
    if mode == BoxMode.XYXY_ABS:
        box[2:] -= box[:2]
    outline = annotation.get("segmentation")
    if isinstance(outline, dict) and isinstance(outline.get("counts"), bytes):
        outline = {**outline, "counts": outline["counts"].decode()}
    return {
        "image_id": image,
        "category_id": label,
        "bbox": box.tolist(),
        "area": annotation.get("area"),
        "iscrowd": annotation.get("iscrowd"),
        "segmentation": outline,
    }


def _as_json(value):
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} is no number, text or list")


class CheckedMapper:
    """A mapper of the user's, whose training samples are checked as the loader gets them.

    Args:
        mapper: Maps a dataset dict to a sample.
        num_classes: K.
    """

    def __init__(self, mapper, num_classes: int):
        self.mapper = mapper
        self.num_classes = num_classes

    def __call__(self, record: dict) -> dict:
        sample = self.mapper(record)
        fault = self._fault(sample)
        if fault:
            name = quoted(record["file_name"])
            raise InputError(f"the mapper {type(self.mapper).__name__} gives for {name} {fault}.")
        return sample

    def _fault(self, sample) -> str:
        if not isinstance(sample, dict):
            return f"no dict but {quoted(sample)}"
        image, instances = sample.get("image"), sample.get("instances")
        if not isinstance(image, torch.Tensor) or image.dim() != 3 or not image.numel():
            return "no 'image', a tensor [3, height, width]"
        if instances is None or not (instances.has("gt_boxes") and instances.has("gt_classes")):
            return "no 'instances' with gt_boxes and gt_classes"
        boxes, labels = instances.gt_boxes.tensor, instances.gt_classes
        if not boxes.isfinite().all() or bool((boxes[:, 2:] <= boxes[:, :2]).any()):
            return "boxes that are not finite or have no size"
        if bool(((labels < 0) | (labels >= self.num_classes)).any()):
            return f"classes outside [0, {self.num_classes}): {quoted(labels.tolist())}"
        return ""
