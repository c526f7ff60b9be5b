"""Boxes of teachers for the images of a dataset, from result files in COCO's format."""

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
    """Boxes with scores for the images of a dataset, in its order: four arrays, which the workers of
    a loader share.

    starts [images + 1] int64: image i has the boxes starts[i]:starts[i + 1]; boxes [T, 4] float32,
    xyxy pixels inside of their image; labels [T] int32, of the model; scores [T] float32 in (0, 1].
    """

    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    @classmethod
    def sort(cls, images, boxes, labels, scores, *, num_images: int) -> TeacherBoxes:
        """From boxes in any order; images [T]: the number of each one's image. Within an image they
        keep their order."""
        order = np.argsort(images, kind="stable")
        starts = np.searchsorted(images[order], np.arange(num_images + 1))
        return cls(starts, boxes[order], labels[order], scores[order])

    @property
    def counts(self) -> np.ndarray:
        """[images]: boxes of each."""
        return np.diff(self.starts)

    def summary(self) -> str:
        counts = self.counts
        return (
            f"{counts.sum()} boxes in {np.count_nonzero(counts)} of {len(counts)} images; "
            f"in an image: median {np.median(counts):g}, most {counts.max()}"
        )

    def of(self, image: int) -> list[dict]:
        """As annotations of the image's record, with a score."""
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
    """The boxes of a file for a dataset, and what was left out.

    num_read: boxes in the file; num_unknown: for images that the dataset has not, of which
    unknown_ids are some; num_unscored: with the score 0, which would teach nothing; the others as in
    `LoadedDataset`.
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
        """A few lines for the log."""
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
    """The records of a dataset, each with the teacher's boxes among its annotations."""

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
    """Takes the entries of a result file while it is parsed, so that they never exist together.

    `json.load` calls `take` with every object that it has read, and keeps its answer: None for a
    detection in order, whose numbers then stand in the arrays; else the object itself.
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
        """What is wrong with an entry, as the end of a sentence; "" if nothing is."""
        if not isinstance(entry, dict):
            return f"must have image_id, category_id, bbox and score, got {entry!r}"
        for key in ("image_id", "category_id", "bbox", "score"):
            if key not in entry:
                return f"has no {key!r}"
        image_id, category, box = entry["image_id"], entry["category_id"], entry["bbox"]
        if type(image_id) not in (int, str):
            return f"has the image_id {image_id!r}, which is neither a number nor a text"
        if type(category) is not int or category not in self.label_of:
            return f"has the category_id {category!r}, which the dataset has not"
        numbers = isinstance(box, list) and all(type(value) in (int, float) for value in box)
        if not numbers or len(box) != 4:
            return f"must have a bbox [x, y, width, height], got {box!r}"
        score = entry["score"]
        if type(score) not in (int, float) or not 0 <= score <= 1:
            return f"must have a score in [0, 1], got {score!r}"
        return ""


def _parse(file_name: str, entries: _Entries) -> int:
    """Fill `entries` from a file; returns how many it has. InputError where one is out of order."""
    try:
        with PathManager.open(file_name, "r", encoding="utf-8") as file:
            content = json.load(file, object_hook=entries.take)
    except FileNotFoundError:
        raise InputError(
            f"the teacher boxes {file_name} do not exist: tools/make_teacher_boxes.py makes them, "
            "and DATASETS.TEACHER_BOXES names them."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: not json, cut off, or not UTF-8
        raise InputError(f"the teacher boxes {file_name} cannot be read: {error}.") from None
    if not isinstance(content, list) or not content:
        raise InputError(f"{file_name} must hold a list of results, at least one.")
    wrong = next((i for i, entry in enumerate(content) if entry is not None), None)
    if wrong is not None:
        raise InputError(f"{file_name}: result {wrong} {entries.fault(content[wrong])}.")
    return len(content)


@cache
def load_teacher_boxes(loaded: LoadedDataset, file_name: str) -> LoadedTeacher:
    """The boxes of a result file (a list of image_id, category_id, bbox, score) for a dataset.

    Boxes are cleaned as those of the dataset are; a second call gives the same object. Raises
    InputError with one sentence where the file is not of this form or does not fit the dataset.
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
        name: _finding(loaded, images, given, np.flatnonzero(is_so))
        for name, is_so in faults.items()
    }
    is_kept = ~(faults["no_size"] | faults["outside"])
    if 2 * is_kept.sum() < len(given):
        examples = (findings["no_size"].examples + findings["outside"].examples)[:_NUM_EXAMPLES]
        raise InputError(
            f"{len(given) - is_kept.sum()} of the {len(given)} boxes in {file_name} have no size or "
            f"are outside of their image, e.g. {', '.join(examples)}: a bbox must be [x, y, width, "
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
    """`records.fit_box` for many: boxes [T, 4] xywh in images of sizes [T, 2] (width, height).

    Returns them as xyxy inside their image, and [T] bool: "no_size", "outside" and "clipped".
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
    """Training dataset -> its file of teacher boxes; empty where nothing is to be taught."""
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
                "DATASETS.TEACHER_BOXES must be a list of [dataset, json file], each two texts, got "
                f"{entry!r}."
            )
        name, file_name = entry
        if files.setdefault(name, file_name) != file_name:
            raise InputError(
                f"DATASETS.TEACHER_BOXES names two files for {name!r}, {files[name]} and {file_name}: "
                "merge them by tools/make_teacher_boxes.py."
            )
    for name in cfg.DATASETS.TRAIN:
        if name not in files:
            raise InputError(
                f"MODEL.DN_DETR.TEACH needs teacher boxes for every training dataset, but "
                f"DATASETS.TEACHER_BOXES names none for {name!r}."
            )
    return {name: files[name] for name in cfg.DATASETS.TRAIN}
