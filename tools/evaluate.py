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

from detectron2.data import MetadataCatalog

from dn_detr.d2.data.catalog import register_coco_format, register_shapes
from dn_detr.d2.data.dataset_dicts import load_annotations
from dn_detr.d2.data.ground_truth import read_results
from dn_detr.d2.evaluation.coco_evaluator import COCO_LIMIT, coco_eval_class, evaluate
from dn_detr.d2.evaluation.report import write_report
from dn_detr.errors import InputError


def run(args: argparse.Namespace) -> str:
    register_shapes()
    name = args.dataset
    if args.coco:
        name = args.coco[0]
        register_coco_format([name, *args.coco])
    truth = load_annotations(name).truth
    if not len(truth.labels):
        raise InputError(f"{name} has no annotations to evaluate against.")
    found = read_results(args.results, truth)
    if found.unknown_ids:
        truth.index(found.unknown_ids[0], args.results)  # raises
    if (found.boxes[:, 2:] < 0).any():
        first = (found.boxes[:, 2:] < 0).any(1).argmax()
        raise InputError(
            f"{args.results}: the bbox of result {first} must be [x, y, width, height], got "
            f"{found.boxes[first].tolist()}."
        )
    results = found.to_coco()
    evaluated = evaluate(
        truth.to_coco(),
        results,
        "bbox",
        max_detections=args.limit,
        coco_eval=coco_eval_class(args.implementation),
    )
    return write_report(
        str(args.output),
        evaluated,
        results,
        name=args.dataset or Path(name).stem,
        image_root=MetadataCatalog.get(name).get("image_root", ""),
    )


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
