"""Detectron2's COCO evaluation with all detections of an image and an optional report."""

from __future__ import annotations

import itertools
import json
import logging
import os

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.structures import Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from dn_detr.d2.data.dataset_dicts import load_annotations
from dn_detr.d2.evaluation.report import write_report
from dn_detr.errors import InputError

logger = logging.getLogger(__name__)

COCO_LIMIT = 100
"""Most detections per class and image in COCO's own AP."""


class Evaluator(COCOEvaluator):
    """Evaluate COCO's AP of boxes (and masks) on a dataset of Detectron2's catalog.

    The ground truth is what `GroundTruth` holds, as in training, so images and annotations may have
    any ids. Classes of the model are mapped to the dataset by name; detections of other classes are
    left out.

    Args:
        dataset_name: Name in the catalog.
        output_dir: Folder of the results.
        max_detections: Most detections per class and image.
        implementation: One of IMPLEMENTATIONS, which agree up to rounding.
        model_classes: Class names of the model; None or empty takes those of the dataset.
        writes_report: Whether to write a report (`report.py`) to output_dir/report_<dataset>.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        output_dir: str,
        max_detections: int = COCO_LIMIT,
        implementation: str = "detectron2",
        model_classes: list[str] | None = None,
        writes_report: bool = False,
    ):
        # Not Detectron2's constructor, which reads the annotation file again.
        os.makedirs(output_dir, exist_ok=True)
        self._logger = logging.getLogger(__name__)
        self._distributed, self._tasks, self._output_dir = True, None, output_dir
        self._cpu_device = torch.device("cpu")
        self._metadata = MetadataCatalog.get(dataset_name)
        self.truth = load_annotations(dataset_name).truth
        self.dataset_name = dataset_name
        self.max_detections = max_detections
        self.coco_eval = coco_eval_class(implementation)
        self.writes_report = writes_report
        ours, theirs = model_classes or [], self.truth.class_names
        self.to_dataset: Tensor | None = None
        if ours and ours != theirs:
            index = {name: i for i, name in enumerate(theirs)}
            self.to_dataset = torch.tensor([index.get(name, -1) for name in ours])
            unknown = [name for name in theirs if name not in ours]
            self._logger.info(
                f"{dataset_name} has {len(theirs) - len(unknown)} of the model's {len(ours)} "
                "classes, matched by name"
                f"{f'; the model does not know {unknown}' if unknown else ''}"
            )

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Collect the detections of a batch; see `COCOEvaluator`."""
        if self.to_dataset is not None:
            outputs = [{"instances": self._relabel(output["instances"])} for output in outputs]
        for sample, output in zip(inputs, outputs, strict=True):
            is_bad = "unreadable" in sample  # see `build_test_loader`
            super().process(
                [sample], [{"instances": output["instances"][:0]} if is_bad else output]
            )
            if is_bad:
                self._predictions[-1]["unreadable"] = sample["unreadable"]

    def _relabel(self, instances: Instances) -> Instances:
        """Map labels to the dataset's classes and drop detections of other classes."""
        instances = instances.to("cpu")
        instances.pred_classes = self.to_dataset[instances.pred_classes]
        return instances[instances.pred_classes >= 0]

    def _eval_predictions(self, predictions: list[dict], img_ids: list | None = None) -> None:
        """Fill self._results with task -> metrics; `evaluate` calls this on the main rank."""
        if faults := [one["unreadable"] for one in predictions if "unreadable" in one]:
            text = f"{len(faults)} images of {self.dataset_name} count as without detections:"
            self._logger.warning("\n  ".join([text, *faults]))
        found = list(itertools.chain(*(prediction["instances"] for prediction in predictions)))
        ids = self.truth.category_ids
        written = [{**result, "category_id": ids[result["category_id"]]} for result in found]
        with open(
            os.path.join(self._output_dir, "coco_instances_results.json"), "w", encoding="utf-8"
        ) as file:
            json.dump(written, file)
        if not self.truth.has_annotations:
            self._logger.info("Annotations are not available for evaluation.")
            return
        results = [
            {
                **result,
                "image_id": self.truth.index(result["image_id"], "a detection") + 1,
                "category_id": result["category_id"] + 1,
            }
            for result in found
        ]
        if img_ids is not None:
            img_ids = [self.truth.index(image_id, "img_ids") + 1 for image_id in img_ids]
        tasks = self._tasks_from_predictions(results)
        with_masks = "segm" in tasks
        truth = load_annotations(self.dataset_name, with_masks=with_masks).truth
        coco, evaluated = truth.to_coco(with_masks=with_masks), {}
        for task in tasks:
            evaluated[task] = evaluate(
                coco,
                results,
                task,
                max_detections=self.max_detections,
                coco_eval=self.coco_eval,
                image_ids=img_ids,
            )
            self._results[task] = self._derive_coco_results(
                evaluated[task], task, class_names=self.truth.class_names
            )
        if self.writes_report and evaluated["bbox"] is not None:
            report = write_report(
                os.path.join(self._output_dir, f"report_{_part_of_path(self.dataset_name)}"),
                evaluated["bbox"],
                results,
                name=self.dataset_name,
                image_root=self._metadata.get("image_root", ""),
                masks=evaluated.get("segm"),
            )
            self._logger.info(f"wrote the report {report}")


def _part_of_path(name: str) -> str:
    """Return the name of a dataset, which may be a path, as the name of one folder."""
    return name.replace("/", "%2F")


def build_evaluator(cfg: CfgNode, dataset_name: str) -> Evaluator:
    """Build the evaluator of a configuration for one of its datasets.

    Its files go to the folder "inference", and there to a folder of its own if there are several.
    """
    test, folder = cfg.TEST, os.path.join(cfg.OUTPUT_DIR, "inference")
    if len(cfg.DATASETS.TEST) > 1:
        folder = os.path.join(folder, _part_of_path(dataset_name))
    return Evaluator(
        dataset_name,
        output_dir=folder,
        max_detections=test.COCO_LIMIT or max(COCO_LIMIT, test.DETECTIONS_PER_IMAGE),
        implementation=test.COCO_EVAL,
        model_classes=list(cfg.MODEL.DN_DETR.CLASS_NAMES),
        writes_report=test.REPORT,
    )


def evaluate(
    coco: COCO,
    results: list[dict],
    task: str,
    *,
    max_detections: int = COCO_LIMIT,
    coco_eval: type[COCOeval] | None = None,
    image_ids: list | None = None,
) -> COCOeval | None:
    """Evaluate, accumulate and summarize results against the ground truth.

    Args:
        coco: Ground truth.
        results: Detections in COCO's result format.
        task: "bbox" or "segm".
        max_detections: Most detections per class and image.
        coco_eval: Class that evaluates; None takes "detectron2" of IMPLEMENTATIONS.
        image_ids: Images to evaluate; None takes all.

    Returns:
        The evaluation, or None if there are no results.
    """
    if not results:
        return None
    if max_detections < 1:
        raise InputError(f"the limit of detections must be at least 1, got {max_detections}.")
    if task == "segm":  # pycocotools would use the area of a box for its mask
        results = [{k: v for k, v in result.items() if k != "bbox"} for result in results]
    evaluated = (coco_eval or coco_eval_class("detectron2"))(coco, coco.loadRes(results), task)
    evaluated.params.maxDets = [1, 10, max_detections]
    if image_ids is not None:
        evaluated.params.imgIds = image_ids
    evaluated.evaluate()
    evaluated.accumulate()
    evaluated.summarize()
    return evaluated


def _of_detectron2() -> type[COCOeval]:
    try:
        from detectron2.evaluation.fast_eval_api import COCOeval_opt
    except ImportError:
        logger.warning(
            "this Detectron2 has no compiled operators, so pycocotools computes AP: equal up to "
            "rounding, but slower. TEST.COCO_EVAL 'faster_coco_eval' is fast without them."
        )
        return COCOevalMaxDets

    class FastCOCOeval(COCOevalMaxDets, COCOeval_opt):
        """Detectron2's C++ evaluation with the `summarize` of COCOevalMaxDets."""

    return FastCOCOeval


def _of_faster_coco_eval() -> type[COCOeval]:
    try:
        from faster_coco_eval.core import COCOeval_faster
    except ImportError:
        raise InputError(
            "TEST.COCO_EVAL 'faster_coco_eval' needs that package: pip install faster-coco-eval."
        ) from None

    class FasterCOCOeval(COCOevalMaxDets, COCOeval_faster):
        """faster-coco-eval with the `summarize` of COCOevalMaxDets."""

    return FasterCOCOeval


IMPLEMENTATIONS = {
    "detectron2": _of_detectron2,
    "pycocotools": lambda: COCOevalMaxDets,
    "faster_coco_eval": _of_faster_coco_eval,
}
"""TEST.COCO_EVAL -> function that returns the class that evaluates."""


def coco_eval_class(implementation: str) -> type[COCOeval]:
    """Return the class that evaluates for TEST.COCO_EVAL; InputError if it is unknown."""
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"TEST.COCO_EVAL must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}."
        )
    return IMPLEMENTATIONS[implementation]()
