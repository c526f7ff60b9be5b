"""AP of results in COCO format, from any detector, and the report on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.data import MetadataCatalog

from dn_detr.d2.config.defaults import default_config
from dn_detr.d2.data.catalog import register_all, register_coco_format, register_shapes
from dn_detr.d2.data.dataset_dicts import load_annotations
from dn_detr.d2.data.ground_truth import read_results
from dn_detr.d2.evaluation.coco_evaluator import COCO_LIMIT, coco_eval_class, evaluate
from dn_detr.d2.evaluation.report import write_report
from dn_detr.errors import InputError


def evaluate_results(
    results_file: str,
    output: str,
    *,
    coco: Sequence[str] = (),
    folder: str = "",
    dataset: str = "",
    limit: int = COCO_LIMIT,
    implementation: str = "detectron2",
) -> str:
    """Evaluate a file and write the report.

    Args:
        results_file: json: a list of image_id, category_id, bbox and score.
        output: Folder of the report.
        coco: Ground truth as a json file and its image folder; or
        folder: a dataset folder, of which val, else test, is used; or
        dataset: the name of a dataset.
        limit: Most detections of a class in an image.
        implementation: See TEST.COCO_EVAL.

    Returns:
        The path of the report.
    """
    register_shapes()
    name = dataset
    if coco:
        name = coco[0]
        register_coco_format([name, *coco])
    elif folder:
        cfg = default_config()
        cfg.DATASETS.FOLDER = folder
        register_all(cfg, eval_only=True)
        name = cfg.DATASETS.TEST[0]
    truth = load_annotations(name).truth
    if not len(truth.labels):
        raise InputError(f"{name} has no annotations to evaluate against.")
    found = read_results(results_file, truth)
    if found.unknown_ids:
        truth.index(found.unknown_ids[0], results_file)  # raises
    if (found.boxes[:, 2:] < 0).any():
        first = (found.boxes[:, 2:] < 0).any(1).argmax()
        raise InputError(
            f"{results_file}: the bbox of result {first} must be [x, y, width, height], got "
            f"{found.boxes[first].tolist()}."
        )
    results = found.to_coco()
    evaluated = evaluate(
        truth.to_coco(),
        results,
        "bbox",
        max_detections=limit,
        coco_eval=coco_eval_class(implementation),
    )
    return write_report(
        str(output),
        evaluated,
        results,
        name=Path(name).stem if coco else name,
        image_root=MetadataCatalog.get(name).get("image_root", ""),
    )
