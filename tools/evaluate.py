#!/usr/bin/env python
"""Evaluate results in COCO format, from any detector, and write the report.

    python tools/evaluate.py --coco cells/val.json cells/images \
        --results output/inference/coco_instances_results.json --output report/
    python tools/evaluate.py --dataset coco_2017_val --results results.json --output report/

For a trained model use train_net.py --eval-only; TEST.REPORT True writes the same report.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

from dn_detr.d2.data.catalog import class_names, register_shapes
from dn_detr.d2.data.coco_check import check_annotations, read_json, read_results
from dn_detr.d2.evaluation.coco_evaluator import (
    COCO_LIMIT,
    coco_eval_class,
    evaluate,
    number_from_one,
)
from dn_detr.d2.evaluation.report import write_report
from dn_detr.errors import InputError


def files_of(dataset: str) -> tuple[str, str]:
    """Return json file and image folder of a registered dataset."""
    register_shapes()
    class_names(dataset)  # refuses names that are not registered
    metadata = MetadataCatalog.get(dataset)
    if metadata.get("json_file") is None:
        raise InputError(f"the dataset {dataset!r} has no json file: give --coco JSON IMAGES.")
    if metadata.get("is_drawn_on_first_use"):
        DatasetCatalog.get(dataset)
    return metadata.json_file, metadata.image_root


def run(args: argparse.Namespace) -> str:
    json_file, image_root = args.coco or files_of(args.dataset)
    content = read_json(json_file)
    check_annotations(json_file, content)
    if not content.get("annotations"):
        raise InputError(f"{json_file} has no annotations to evaluate against.")
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    number_from_one(coco)
    results = read_results(args.results, content)
    evaluated = evaluate(
        coco,
        results,
        "bbox",
        max_detections=args.limit,
        coco_eval=coco_eval_class(args.implementation),
    )
    name = args.dataset or Path(json_file).stem
    return write_report(str(args.output), evaluated, results, name=name, image_root=image_root)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--coco", nargs=2, metavar=("JSON", "IMAGES"), help="ground truth")
    source.add_argument("--dataset", help="name of a dataset as ground truth")
    parser.add_argument("--results", required=True, help="json: image_id, category_id, bbox, score")
    parser.add_argument("--output", type=Path, required=True, help="folder of the report")
    parser.add_argument(
        "--limit", type=int, default=COCO_LIMIT, help="maximum detections of a class in an image"
    )
    parser.add_argument("--implementation", default="detectron2", help="see TEST.COCO_EVAL")
    try:
        print(f"wrote {run(parser.parse_args(arguments))}")
    except InputError as error:
        sys.exit(f"evaluate.py: {error}")


if __name__ == "__main__":
    main()
