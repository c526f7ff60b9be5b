"""COCO evaluation: Detectron2's, with all detections of an image, and with a report on request."""

from __future__ import annotations

import itertools
import json
import logging
import os
from importlib import import_module

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.structures import Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from dn_detr.d2.data.catalog import class_names
from dn_detr.d2.evaluation.report import write_report
from dn_detr.errors import InputError

logger = logging.getLogger(__name__)

COCO_LIMIT = 100
"""Detections of a class in an image that count in COCO's own AP."""


class Evaluator(COCOEvaluator):
    """AP of boxes (and masks) in COCO's way, for a dataset of Detectron2's catalog.

    Differences to Detectron2's: up to `max_detections` of a class in an image count, with any
    implementation; an annotation id of 0 is matched like any other; classes of the model are found
    in the dataset by their names, and left out where it has them not; with `writes_report` a report
    (`evaluation_report.py`) is written to output_dir/report_<dataset>.
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
        """implementation: one of IMPLEMENTATIONS, which agree to rounding; model_classes: names of
        the model's classes, None or empty: those of the dataset."""
        os.makedirs(output_dir, exist_ok=True)
        super().__init__(dataset_name, output_dir=output_dir, use_fast_impl=False)
        number_from_one(self._coco_api)
        self.dataset_name = dataset_name
        self.max_detections = max_detections
        self.coco_eval = coco_eval_class(implementation)
        self.writes_report = writes_report
        ours, theirs = model_classes or [], class_names(dataset_name)
        self.to_dataset: Tensor | None = None
        if ours and ours != theirs:
            number = {name: i for i, name in enumerate(theirs)}
            self.to_dataset = torch.tensor([number.get(name, -1) for name in ours])
            unknown = [name for name in theirs if name not in ours]
            self._logger.info(
                f"{dataset_name} has {len(theirs) - len(unknown)} of the model's {len(ours)} classes, "
                f"by their names{f'; the model does not know {unknown}' if unknown else ''}"
            )

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        if self.to_dataset is not None:
            outputs = [{"instances": self._renamed(output["instances"])} for output in outputs]
        super().process(inputs, outputs)

    def _renamed(self, instances: Instances) -> Instances:
        """Detections of classes that the dataset has, numbered as it does."""
        instances = instances.to("cpu")
        instances.pred_classes = self.to_dataset[instances.pred_classes]
        return instances[instances.pred_classes >= 0]

    def _eval_predictions(self, predictions: list[dict], img_ids: list | None = None) -> None:
        """Fills self._results: task -> metrics. Called by `evaluate`, in the main process."""
        results = list(itertools.chain(*(prediction["instances"] for prediction in predictions)))
        to_ours = self._metadata.get("thing_dataset_id_to_contiguous_id") or {}
        to_theirs = {ours: theirs for theirs, ours in to_ours.items()}
        for result in results:
            result["category_id"] = to_theirs.get(result["category_id"], result["category_id"])
        with open(os.path.join(self._output_dir, "coco_instances_results.json"), "w") as file:
            json.dump(results, file)
        if not self._do_evaluation:
            self._logger.info("Annotations are not available for evaluation.")
            return
        evaluated = {}
        for task in self._tasks_from_predictions(results):
            evaluated[task] = evaluate(
                self._coco_api,
                results,
                task,
                max_detections=self.max_detections,
                coco_eval=self.coco_eval,
                image_ids=img_ids,
            )
            self._results[task] = self._derive_coco_results(
                evaluated[task], task, class_names=self._metadata.get("thing_classes")
            )
        if self.writes_report and evaluated["bbox"] is not None:
            page = write_report(
                os.path.join(self._output_dir, f"report_{self.dataset_name}"),
                evaluated["bbox"],
                results,
                name=self.dataset_name,
                image_root=self._metadata.get("image_root"),
                masks=evaluated.get("segm"),
            )
            self._logger.info(f"wrote the report {page}")


def build_evaluator(cfg: CfgNode, dataset_name: str) -> Evaluator:
    """The evaluator of a configuration for one of its datasets."""
    test = cfg.TEST
    return Evaluator(
        dataset_name,
        output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"),
        max_detections=test.COCO_LIMIT or max(COCO_LIMIT, test.DETECTIONS_PER_IMAGE),
        implementation=test.COCO_EVAL,
        model_classes=list(cfg.MODEL.DN_DETR.CLASS_NAMES),
        writes_report=test.REPORT,
    )


def number_from_one(coco: COCO) -> None:
    """Renumber annotations where one has the id 0: pycocotools takes a match with it for none."""
    if 0 in coco.anns:
        for number, annotation in enumerate(coco.dataset["annotations"], 1):
            annotation["id"] = number
        coco.createIndex()


def evaluate(
    coco: COCO,
    results: list[dict],
    task: str,
    *,
    max_detections: int = COCO_LIMIT,
    coco_eval: type[COCOeval] | None = None,
    image_ids: list | None = None,
) -> COCOeval | None:
    """Results in COCO's format against the ground truth: evaluated, accumulated, summarised; None
    where there are no results. task: "bbox" or "segm"."""
    if not results:
        return None
    if task == "segm":  # with a box, pycocotools would take its area for that of the mask
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
        fast = import_module("detectron2.evaluation.fast_eval_api").COCOeval_opt
    except ImportError:
        logger.warning(
            "this Detectron2 has no compiled operators, so pycocotools computes AP: the same to "
            "rounding, but slower. TEST.COCO_EVAL 'faster_coco_eval' is fast without them."
        )
        return COCOevalMaxDets
    return type("FastCOCOeval", (COCOevalMaxDets, fast), {})  # summarize of the one, else the other


def _of_faster_coco_eval() -> type[COCOeval]:
    try:
        fast = import_module("faster_coco_eval.core").COCOeval_faster
    except ImportError:
        raise InputError(
            "TEST.COCO_EVAL 'faster_coco_eval' needs that package: pip install faster-coco-eval."
        ) from None
    return type("FasterCOCOeval", (COCOevalMaxDets, fast), {})


IMPLEMENTATIONS = {
    "detectron2": _of_detectron2,
    "pycocotools": lambda: COCOevalMaxDets,
    "faster_coco_eval": _of_faster_coco_eval,
}
"""TEST.COCO_EVAL -> the class that evaluates."""


def coco_eval_class(implementation: str) -> type[COCOeval]:
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"TEST.COCO_EVAL must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}."
        )
    return IMPLEMENTATIONS[implementation]()
