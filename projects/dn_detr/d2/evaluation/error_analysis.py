"""Analysis of an evaluation: classes, thresholds, confusions, and the images with most errors.

Boxes are matched by pycocotools at IoU 0.5 over all sizes. At a threshold, detections count whose
score is at least that.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IOU = 0.5


@dataclass(frozen=True)
class OperatingPoint:
    """Precision, recall and F1 of the detections scored at least `threshold`."""

    threshold: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, eq=False)
class Curve:
    """Precision and recall at every distinct score.

    Args:
        thresholds: [N] scores, descending.
        precision: [N].
        recall: [N].
        num_objects: Objects to find.
    """

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    num_objects: int

    @property
    def f1(self) -> np.ndarray:
        """F1 at every threshold, [N]."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / np.where(total > 0, total, 1)

    def best(self) -> OperatingPoint | None:
        """Return the (highest) threshold with the best F1; None without detections or objects."""
        if not self.num_objects or not len(self.thresholds):
            return None
        i = int(self.f1.argmax())
        values = (self.thresholds[i], self.precision[i], self.recall[i], self.f1[i])
        return OperatingPoint(*map(float, values))


@dataclass(frozen=True, eq=False)
class ClassResult:
    """Results of a class, AP in percent.

    Args:
        name: Name of the class.
        ap: AP at IoU 0.5 to 0.95; NaN, like ap50 and ap75, for a class without objects.
        ap50: AP at IoU 0.5.
        ap75: AP at IoU 0.75.
        curve: Precision and recall.
        mask_ap: AP of masks; None if masks were not evaluated.
    """

    name: str
    ap: float
    ap50: float
    ap75: float
    curve: Curve
    mask_ap: float | None = None


@dataclass(frozen=True, eq=False)
class ImageResult:
    """Results and annotations of an image at a threshold, in COCO's format.

    Args:
        image: Entry of the annotation file.
        correct: Results that match an object of their class.
        confused: Results that match an object of another class.
        extra: Results that match nothing.
        missed: Annotations without a match.
    """

    image: dict
    correct: list[dict]
    confused: list[dict]
    extra: list[dict]
    missed: list[dict]

    @property
    def num_errors(self) -> int:
        """Number of confused and extra results and missed annotations."""
        return len(self.confused) + len(self.extra) + len(self.missed)


@dataclass(frozen=True, eq=False)
class Analysis:
    """Analysis of an evaluation. All but mask_metrics and mask AP is about boxes.

    Args:
        metrics: COCO's metrics of boxes, in percent.
        mask_metrics: COCO's metrics of masks; None if masks were not evaluated.
        classes: Results of the K classes.
        overall: Precision and recall over all classes.
        threshold: Threshold of `confusion` and `images`, with the best F1 of `overall`.
        confusion: [K + 1, K + 1] int64, rows by annotated and columns by detected class; the last
            row counts results that match nothing, the last column missed annotations.
        images: Results by image, most errors first.
    """

    metrics: dict[str, float]
    mask_metrics: dict[str, float] | None
    classes: list[ClassResult]
    overall: Curve
    threshold: float
    confusion: np.ndarray
    images: list[ImageResult]


def analyse(evaluated: COCOeval, results: list[dict], masks: COCOeval | None = None) -> Analysis:
    """Analyse an evaluation.

    Args:
        evaluated: Evaluation of boxes by `coco_evaluator.evaluate`.
        results: The evaluated results.
        masks: Evaluation of their masks, if any.
    """
    coco, params = evaluated.cocoGt, evaluated.params
    matched = match(coco, results, image_ids=params.imgIds, max_detections=params.maxDets[-1])
    by_class = [_curve([m for m in matched if m["category_id"] == c]) for c in params.catIds]
    overall = _curve(matched)
    best = overall.best()
    threshold = best.threshold if best is not None else 0.5
    names = [coco.cats[category]["name"] for category in params.catIds]
    classes = [
        ClassResult(
            name,
            *_average_precisions(evaluated, k),
            curve,
            mask_ap=None if masks is None else _average_precisions(masks, k)[0],
        )
        for k, (name, curve) in enumerate(zip(names, by_class, strict=True))
    ]
    images = images_at(coco, results, threshold=threshold, image_ids=params.imgIds)
    return Analysis(
        metrics=_metrics(evaluated),
        mask_metrics=None if masks is None else _metrics(masks),
        classes=classes,
        overall=overall,
        threshold=threshold,
        confusion=confusion_of(images, list(params.catIds)),
        images=sorted(images, key=lambda image: -image.num_errors),
    )


def match(
    coco: COCO,
    results: list[dict],
    *,
    image_ids: list,
    max_detections: int,
    ignores_classes: bool = False,
) -> list[dict]:
    """Match boxes with annotations by pycocotools at IoU 0.5.

    Args:
        coco: Ground truth.
        results: Detections in COCO's result format.
        image_ids: Images to match.
        max_detections: Most detections per image (and class).
        ignores_classes: Whether results may match objects of other classes.

    Returns:
        Entries of pycocotools' `evalImgs`, one per image (and class).
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        params = evaluation.params
        params.imgIds, params.maxDets, params.iouThrs = image_ids, [max_detections], np.array([IOU])
        params.areaRng, params.areaRngLbl = [[0, 1e10]], ["all"]
        params.useCats = int(not ignores_classes)
        evaluation.evaluate()
    return [entry for entry in evaluation.evalImgs if entry is not None]


def _curve(matched: list[dict]) -> Curve:
    """Compute the curve of all results in these entries of `match`."""
    num_objects = int(sum((~np.asarray(m["gtIgnore"], bool)).sum() for m in matched))
    scores = np.concatenate([np.zeros(0), *(m["dtScores"] for m in matched)])
    counts = ~np.concatenate([np.zeros(0, bool), *(m["dtIgnore"][0].astype(bool) for m in matched)])
    is_right = np.concatenate([np.zeros(0, bool), *(m["dtMatches"][0] > 0 for m in matched)])
    scores, is_right = scores[counts], is_right[counts]
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], np.cumsum(is_right[order])
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True)) if len(scores) else []
    scores, right, found = scores[last], right[last], np.arange(1, len(scores) + 1)[last]
    return Curve(scores, right / np.maximum(found, 1), right / max(num_objects, 1), num_objects)


def images_at(
    coco: COCO, results: list[dict], *, threshold: float, image_ids: list
) -> list[ImageResult]:
    """List correct and wrong results of every image at a threshold.

    Classes are compared after matching: results match the object they overlap most, best scores
    first, regardless of its class. Results on crowd regions are ignored.
    """
    kept = [result for result in results if result["score"] >= threshold]
    index = {id_: i for i, id_ in enumerate(image_ids)}
    found = [ImageResult(coco.imgs[id_], [], [], [], []) for id_ in image_ids]
    if not kept:
        for id_ in image_ids:
            missed = [a for a in coco.imgToAnns[id_] if not a.get("iscrowd", 0)]
            found[index[id_]].missed.extend(missed)
        return found
    loaded = coco.loadRes(kept).anns  # result id -> result, with the ids of `match`
    for entry in match(
        coco, kept, image_ids=image_ids, max_detections=len(kept), ignores_classes=True
    ):
        image = found[index[entry["image_id"]]]
        for result_id, annotation_id, is_ignored in zip(
            entry["dtIds"], entry["dtMatches"][0], entry["dtIgnore"][0], strict=True
        ):
            result = loaded[result_id]
            if is_ignored:
                continue
            if not annotation_id:
                image.extra.append(result)
                continue
            truth = coco.anns[int(annotation_id)]
            is_right = truth["category_id"] == result["category_id"]
            result = {**result, "true_category_id": truth["category_id"]}
            (image.correct if is_right else image.confused).append(result)
        for annotation_id, result_id, is_ignored in zip(
            entry["gtIds"], entry["gtMatches"][0], entry["gtIgnore"], strict=True
        ):
            if not is_ignored and not result_id:
                image.missed.append(coco.anns[annotation_id])
    return found


def confusion_of(images: list[ImageResult], categories: list[int]) -> np.ndarray:
    """Compute the confusion matrix [K + 1, K + 1] int64 of `Analysis`."""
    row = {category: k for k, category in enumerate(categories)}
    background = len(categories)
    matrix = np.zeros((background + 1, background + 1), np.int64)
    for image in images:
        for result in (*image.correct, *image.confused):
            matrix[row[result["true_category_id"]], row[result["category_id"]]] += 1
        for result in image.extra:
            matrix[background, row[result["category_id"]]] += 1
        for annotation in image.missed:
            matrix[row[annotation["category_id"]], background] += 1
    return matrix


def _average_precisions(evaluated: COCOeval, k: int) -> tuple[float, float, float]:
    """Return (AP, AP50, AP75) of class k in percent; NaN if it has no objects."""
    precision = evaluated.eval["precision"][:, :, k, 0, -1]  # [thresholds, recalls]
    if (precision < 0).all():
        return (float("nan"),) * 3
    by_iou = 100 * precision.mean(axis=1)
    thresholds = np.asarray(evaluated.params.iouThrs)
    ap50, ap75 = (by_iou[np.abs(thresholds - iou).argmin()] for iou in (0.5, 0.75))
    return float(by_iou.mean()), float(ap50), float(ap75)


def _metrics(evaluated: COCOeval) -> dict[str, float]:
    """Return COCO's summary by name in percent; NaN if there are no objects of that size."""
    limits = evaluated.params.maxDets
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", *(f"AR{limit}" for limit in limits)]
    values = [float(value) for value in evaluated.stats[: len(names)]]
    return {
        name: 100 * value if value >= 0 else float("nan")
        for name, value in zip(names, values, strict=True)
    }
