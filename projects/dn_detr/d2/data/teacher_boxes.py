"""Teacher boxes for the images of a dataset, from result files in COCO's format."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import BoxMode
from torch.utils.data import Dataset

from dn_detr.d2.data.dataset_dicts import LoadedDataset
from dn_detr.d2.data.ground_truth import (
    CLIPPED,
    Finding,
    describe,
    find_faults,
    fit_boxes,
    read_results,
)
from dn_detr.errors import InputError, quoted


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
        findings: Boxes dropped and clipped, as in `GroundTruth.findings`.
    """

    file: str
    boxes: TeacherBoxes
    num_read: int
    num_unknown: int
    unknown_ids: list
    num_unscored: int
    findings: list[Finding]

    def report(self) -> str:
        """Return a few lines for the log."""
        lines = [
            f"teacher {self.file}",
            f"  read       {self.num_read} boxes",
            f"  used       {self.boxes.summary()}",
            *(f"  {line}" for line in describe(self.findings)),
        ]
        if self.num_unscored:
            lines.append(f"  dropped    boxes with the score 0: {self.num_unscored}")
        if self.num_unknown:
            lines.append(
                f"  left out   boxes of images that are not in the dataset: {self.num_unknown} "
                f"(image_id {', '.join(map(quoted, self.unknown_ids))}, ...)"
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


@cache
def load_teacher_boxes(loaded: LoadedDataset, file_name: str) -> LoadedTeacher:
    """Load the boxes of a result file (a list of image_id, category_id, bbox, score) for a dataset.

    Boxes are cleaned like those of the dataset. A second call returns the same object.

    Raises:
        InputError: If the file is not of this form or does not fit the dataset.
    """
    truth = loaded.truth
    found = read_results(
        file_name,
        truth,
        what="file of teacher boxes",
        hint=": make them by tools/make_teacher_boxes.py, or correct DATASETS.TEACHER_BOXES",
    )
    faulty = np.flatnonzero((found.scores < 0) | (found.scores > 1))
    if len(faulty):
        raise InputError(
            f"{file_name}: result {faulty[0]} must have a score in [0, 1], got "
            f"{found.scores[faulty[0]]:g}."
        )
    is_known = found.images >= 0
    if not is_known.any():
        raise InputError(
            f"no image_id in {file_name}, e.g. {quoted(found.unknown_ids[0])}, is in the dataset "
            f"{loaded.name!r}: it was made for another one."
        )
    images, labels, given, scores = (
        values[is_known] for values in (found.images, found.labels, found.boxes, found.scores)
    )
    boxes, faults = fit_boxes(given, truth.sizes[images])
    findings = find_faults(faults, given, lambda i: truth.image(images[i])["file_name"])
    is_kept = faults >= CLIPPED
    if 2 * is_kept.sum() < len(given):
        examples = ", ".join(findings[0].examples + findings[1].examples)
        raise InputError(
            f"{len(given) - is_kept.sum()} of the {len(given)} boxes in {file_name} have no size "
            f"or are outside their image, e.g. {quoted(examples, 120)}: a bbox must be [x, y, "
            f"width, height] in pixels of the images of the dataset {loaded.name!r}."
        )
    is_used = is_kept & (scores > 0)
    boxes[:, 2:] += boxes[:, :2]
    corners = boxes.clip(0, np.tile(truth.sizes[images], 2))[is_used]
    return LoadedTeacher(
        file=file_name,
        boxes=TeacherBoxes.sort(
            images[is_used],
            corners.astype(np.float32),
            labels[is_used].astype(np.int32),
            scores[is_used].astype(np.float32),
            num_images=len(truth),
        ),
        num_read=len(found.images),
        num_unknown=int((~is_known).sum()),
        unknown_ids=found.unknown_ids,
        num_unscored=int((is_kept & ~is_used).sum()),
        findings=findings,
    )


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
