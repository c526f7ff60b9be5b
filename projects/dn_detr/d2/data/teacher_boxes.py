"""Teacher boxes for the images of a dataset, from result files in COCO's format."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from functools import cache

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from torch.utils.data import Dataset

from dn_detr.d2.data.dataset_dicts import ROUNDING, Finding, LoadedDataset, describe
from dn_detr.errors import InputError

_NUM_EXAMPLES = 3


@dataclass(frozen=True, eq=False)
class TeacherBoxes:
    """Boxes with scores for the images of a dataset, as arrays that the loader's workers share.

    Args:
        starts: [images + 1] int64; image i has the boxes starts[i]:starts[i + 1].
        boxes: [N, 4] float32, xyxy pixels inside their image.
        labels: [N] int32, classes of the model.
        scores: [N] float32 in (0, 1].
    """

    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    @classmethod
    def sort(cls, images, boxes, labels, scores, *, num_images: int) -> TeacherBoxes:
        """Sort boxes by their image, keeping their order within an image.

        Args:
            images: [N] int64, index of each box's image.
            boxes: [N, 4] float32.
            labels: [N] int32.
            scores: [N] float32.
            num_images: Images of the dataset.
        """
        order = np.argsort(images, kind="stable")
        starts = np.searchsorted(images[order], np.arange(num_images + 1))
        return cls(starts, boxes[order], labels[order], scores[order])

    @property
    def counts(self) -> np.ndarray:
        """Boxes of each image, [images] int64."""
        return np.diff(self.starts)

    def summary(self) -> str:
        """Describe the numbers of boxes for the log."""
        counts = self.counts
        return (
            f"{counts.sum()} boxes in {np.count_nonzero(counts)} of {len(counts)} images; "
            f"per image: median {np.median(counts):g}, most {counts.max()}"
        )

    def of(self, image: int) -> list[dict]:
        """Return the boxes of an image as annotations with a score."""
        here = slice(self.starts[image], self.starts[image + 1])
        return [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "score": score}
            for box, label, score in zip(
                self.boxes[here].tolist(),
                self.labels[here].tolist(),
                self.scores[here].tolist(),
                strict=True,
            )
        ]


@dataclass(frozen=True, eq=False)
class LoadedTeacher:
    """The boxes of a file for a dataset, and counts of those left out.

    Args:
        file: Name of the file.
        boxes: Boxes to train with.
        num_read: Boxes in the file.
        num_unknown: Boxes of images that are not in the dataset.
        unknown_ids: Some of the ids of these images.
        num_unscored: Boxes with the score 0, which have no weight in the loss.
        no_size: As in `LoadedDataset`, like outside and clipped.
    """

    file: str
    boxes: TeacherBoxes
    num_read: int
    num_unknown: int
    unknown_ids: list
    num_unscored: int
    no_size: Finding
    outside: Finding
    clipped: Finding

    def report(self) -> str:
        """Return a few lines for the log."""
        lines = [
            f"teacher {self.file}",
            f"  read       {self.num_read} boxes",
            f"  used       {self.boxes.summary()}",
            *(f"  {line}" for line in describe(self.no_size, self.outside, self.clipped)),
        ]
        if self.num_unscored:
            lines.append(f"  dropped    boxes with the score 0: {self.num_unscored}")
        if self.num_unknown:
            lines.append(
                f"  left out   boxes of images that are not in the dataset: {self.num_unknown} "
                f"(image_id {', '.join(map(repr, self.unknown_ids))}, ...)"
            )
        return "\n".join(lines)


class WithTeacher(Dataset):
    """Records of a dataset with the teacher's boxes added to their annotations."""

    def __init__(self, records, boxes: TeacherBoxes):
        self.records = records
        self.boxes = boxes

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        return {**record, "annotations": record["annotations"] + self.boxes.of(index)}


# ---------------------------------------------------------------------------------------- reading


class _Entries:
    """Collects the entries of a result file in arrays while it is parsed, to save memory.

    `json.load` calls `take` with every parsed object and keeps the result: None for a valid
    detection, the object itself otherwise.
    """

    def __init__(self, image_of: dict, label_of: dict):
        self.image_of, self.label_of = image_of, label_of
        self.images, self.labels = array("q"), array("i")
        self.boxes, self.scores = array("d"), array("f")
        self.num_unknown, self.unknown_ids = 0, []

    def take(self, entry: dict) -> dict | None:
        if self.fault(entry):
            return entry
        image = self.image_of.get(entry["image_id"])
        if image is None:
            self.num_unknown += 1
            if len(self.unknown_ids) < _NUM_EXAMPLES:
                self.unknown_ids.append(entry["image_id"])
            return None
        self.images.append(image)
        self.labels.append(self.label_of[entry["category_id"]])
        self.boxes.extend(entry["bbox"])
        self.scores.append(entry["score"])
        return None

    def fault(self, entry) -> str:
        """Return what is wrong with an entry, as the end of a sentence, or ""."""
        if not isinstance(entry, dict):
            return f"must have image_id, category_id, bbox and score, got {entry!r}"
        for key in ("image_id", "category_id", "bbox", "score"):
            if key not in entry:
                return f"has no {key!r}"
        image_id, category, box = entry["image_id"], entry["category_id"], entry["bbox"]
        if type(image_id) not in (int, str):
            return f"has the image_id {image_id!r}, which is neither a number nor a string"
        if type(category) is not int or category not in self.label_of:
            return f"has the category_id {category!r}, which is not in the dataset"
        is_numeric = isinstance(box, list) and all(type(value) in (int, float) for value in box)
        if not is_numeric or len(box) != 4:
            return f"must have a bbox [x, y, width, height], got {box!r}"
        score = entry["score"]
        if type(score) not in (int, float) or not 0 <= score <= 1:
            return f"must have a score in [0, 1], got {score!r}"
        return ""


def _parse(file_name: str, entries: _Entries) -> int:
    """Fill `entries` from a file and return their number; InputError if one is invalid."""
    try:
        with PathManager.open(file_name, "r", encoding="utf-8") as file:
            content = json.load(file, object_hook=entries.take)
    except FileNotFoundError:
        raise InputError(
            f"the teacher boxes {file_name} do not exist: make them by "
            "tools/make_teacher_boxes.py, or correct DATASETS.TEACHER_BOXES."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: not json, cut off, or not UTF-8
        raise InputError(f"the teacher boxes {file_name} cannot be read: {error}.") from None
    if not isinstance(content, list) or not content:
        raise InputError(f"{file_name} must hold a list of at least one result.")
    invalid = next((i for i, entry in enumerate(content) if entry is not None), None)
    if invalid is not None:
        raise InputError(f"{file_name}: result {invalid} {entries.fault(content[invalid])}.")
    return len(content)


@cache
def load_teacher_boxes(loaded: LoadedDataset, file_name: str) -> LoadedTeacher:
    """Load the boxes of a result file (a list of image_id, category_id, bbox, score) for a dataset.

    Boxes are cleaned like those of the dataset. A second call returns the same object.

    Raises:
        InputError: If the file is not of this form or does not fit the dataset.
    """
    image_of, sizes = {}, np.full((len(loaded.records), 2), np.inf)
    for i, record in enumerate(loaded.records):
        image_of[record["image_id"]] = i
        sizes[i] = record.get("width", np.inf), record.get("height", np.inf)
    ids = MetadataCatalog.get(loaded.name).get("thing_dataset_id_to_contiguous_id")
    entries = _Entries(image_of, ids or {i: i for i in range(len(loaded.class_names))})
    num_read = _parse(file_name, entries)
    if not entries.images:
        raise InputError(
            f"no image_id in {file_name}, e.g. {entries.unknown_ids[0]!r}, is in the dataset "
            f"{loaded.name!r}: it was made for another one."
        )
    images = np.frombuffer(entries.images, np.int64)
    labels = np.frombuffer(entries.labels, np.int32)
    scores = np.frombuffer(entries.scores, np.float32)
    given = np.frombuffer(entries.boxes, np.float64).reshape(-1, 4)
    boxes, faults = fit_boxes(given, sizes[images])
    findings = {
        name: _finding(loaded, images, given, np.flatnonzero(is_faulty))
        for name, is_faulty in faults.items()
    }
    is_kept = ~(faults["no_size"] | faults["outside"])
    if 2 * is_kept.sum() < len(given):
        examples = (findings["no_size"].examples + findings["outside"].examples)[:_NUM_EXAMPLES]
        raise InputError(
            f"{len(given) - is_kept.sum()} of the {len(given)} boxes in {file_name} have no size "
            f"or are outside their image, e.g. {', '.join(examples)}: a bbox must be [x, y, width, "
            f"height] in pixels of the images of the dataset {loaded.name!r}."
        )
    is_used = is_kept & (scores > 0)
    return LoadedTeacher(
        file=file_name,
        boxes=TeacherBoxes.sort(
            images[is_used],
            boxes[is_used].astype(np.float32),
            labels[is_used],
            scores[is_used],
            num_images=len(loaded.records),
        ),
        num_read=num_read,
        num_unknown=entries.num_unknown,
        unknown_ids=entries.unknown_ids,
        num_unscored=int((is_kept & ~is_used).sum()),
        **findings,
    )


def fit_boxes(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Clip many boxes to their images, like `dataset_dicts.fit_box`.

    Args:
        boxes: [N, 4] float64, xywh pixels.
        sizes: [N, 2] float64, (width, height) of each box's image; inf if unknown.

    Returns:
        The clipped boxes [N, 4], xyxy pixels, and masks [N] bool "no_size", "outside", "clipped".
    """
    has_size = np.isfinite(boxes).all(1) & (boxes[:, 2:] > 0).all(1)
    boxes = np.where(has_size[:, None], boxes, 0)
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
    inside = corners.clip(0, np.tile(sizes, 2))
    is_outside = has_size & ~(inside[:, 2:] > inside[:, :2]).all(1)
    is_moved = ~(np.abs(inside - corners) <= ROUNDING).all(1)
    is_clipped = has_size & ~is_outside & is_moved
    return inside, {"no_size": ~has_size, "outside": is_outside, "clipped": is_clipped}


def _finding(loaded: LoadedDataset, images, boxes, which) -> Finding:
    finding = Finding()
    for i in which[:_NUM_EXAMPLES]:
        finding.add(loaded.records[images[i]], boxes[i])
    finding.count = len(which)
    return finding


# ---------------------------------------------------------------------------------- configuration


def teacher_files(cfg: CfgNode) -> dict[str, str]:
    """Return training dataset -> file of teacher boxes; empty without MODEL.DN_DETR.TEACH."""
    if not cfg.MODEL.DN_DETR.TEACH.ENABLED:
        return {}
    entries = cfg.DATASETS.TEACHER_BOXES
    if len(entries) == 2 and all(isinstance(part, str) for part in entries):
        entries = [entries]
    files = {}
    for entry in entries:
        is_pair = isinstance(entry, (list, tuple)) and len(entry) == 2
        if not is_pair or not all(isinstance(part, str) and part for part in entry):
            raise InputError(
                "DATASETS.TEACHER_BOXES must be a list of [dataset, json file], each two strings, "
                f"got {entry!r}."
            )
        name, file_name = entry
        if files.setdefault(name, file_name) != file_name:
            raise InputError(
                f"DATASETS.TEACHER_BOXES names two files for {name!r}, {files[name]} and "
                f"{file_name}: merge them by tools/make_teacher_boxes.py."
            )
    for name in cfg.DATASETS.TRAIN:
        if name not in files:
            raise InputError(
                f"MODEL.DN_DETR.TEACH needs teacher boxes for every training dataset, but "
                f"DATASETS.TEACHER_BOXES names none for {name!r}."
            )
    return {name: files[name] for name in cfg.DATASETS.TRAIN}
