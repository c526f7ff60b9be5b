#!/usr/bin/env python
"""Make the teachers' boxes for MODEL.DN_DETR.TEACH.

    python tools/make_teacher_boxes.py --dataset coco_2017_train --weights teacher.pth \
        --output output/teacher_boxes.json
    python tools/make_teacher_boxes.py --coco cells/train.json cells/images \
        --weights one.pth other.pth --results retinanet.json --output teacher_boxes.json

Teachers are trained detectors of this project, or results of any detector in COCO format. Their
boxes are merged as in Teach-DETR (2211.11953): boxes that overlap a better one of the same class
are removed, and the best of each image are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from detectron2.utils.logger import setup_logger
from torchvision.ops import batched_nms

from dn_detr.d2.data import dataset_dicts
from dn_detr.d2.data.catalog import prepare, register_coco_format, register_shapes
from dn_detr.d2.data.dataset_dicts import LoadedDataset
from dn_detr.d2.data.ground_truth import read_results
from dn_detr.d2.data.teacher_boxes import TeacherBoxes, load_teacher_boxes
from dn_detr.d2.engine.trainer import Trainer
from dn_detr.d2.evaluation.coco_evaluator import evaluate
from dn_detr.d2.inference.saved_detector import load_detector
from dn_detr.errors import InputError


def detect(
    weights: str, dataset: str, folder: Path, *, config_file: str | None, opts: list[str]
) -> str:
    """Run a trained detector on a dataset, print its AP; return the file of its results."""
    detector = load_detector(weights, config_file=config_file, opts=opts)
    cfg = detector.cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(folder)
    cfg.DATASETS.TEST = (dataset,)
    cfg.MODEL.DN_DETR.CLASS_NAMES = detector.class_names
    prepare(cfg, eval_only=True)
    Trainer.test(cfg, detector.model)
    return str(folder / "inference" / "coco_instances_results.json")


def merge(
    teachers: list[TeacherBoxes], *, iou: float, most: int, threshold: float = 0.0
) -> TeacherBoxes:
    """Merge the boxes of several teachers, sorted by score within each image.

    Removes boxes with a score below `threshold`, boxes that overlap a better one of their class by
    more than `iou`, and boxes after the first `most` of an image.
    """
    counts = sum(teacher.counts for teacher in teachers)
    images = [np.repeat(np.arange(len(counts)), teacher.counts) for teacher in teachers]
    fields = [
        np.concatenate([getattr(teacher, name) for teacher in teachers])
        for name in ("boxes", "labels", "scores")
    ]
    both = TeacherBoxes.sort(np.concatenate(images), *fields, num_images=len(counts))
    kept = []
    for start, end in zip(both.starts[:-1], both.starts[1:], strict=True):
        here = start + np.flatnonzero(both.scores[start:end] >= threshold)
        boxes, scores, labels = (
            torch.from_numpy(values[here]) for values in (both.boxes, both.scores, both.labels)
        )
        kept.append(here[batched_nms(boxes, scores, labels, iou)[:most].numpy()])
    order = np.concatenate(kept)
    starts = np.concatenate(([0], np.cumsum([len(few) for few in kept])))
    return TeacherBoxes(starts, both.boxes[order], both.labels[order], both.scores[order])


def as_results(boxes: TeacherBoxes, loaded: LoadedDataset) -> list[dict]:
    """Convert to COCO results with the ids of the dataset, rounded to hundredths of a pixel."""
    results = []
    for image in range(len(loaded.truth)):
        image_id = loaded.truth.image(image)["image_id"]
        for found in boxes.of(image):
            x0, y0, x1, y1 = found["bbox"]
            results.append(
                {
                    "image_id": image_id,
                    "category_id": loaded.truth.category_ids[found["category_id"]],
                    "bbox": [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)],
                    "score": round(found["score"], 4),
                }
            )
    return results


def run(args: argparse.Namespace) -> None:
    register_shapes()
    if args.coco:
        args.dataset = str(args.output)
        register_coco_format([args.dataset, *args.coco])
    if not (args.weights or args.results):
        raise InputError("pass at least one teacher with --weights or --results.")
    loaded = dataset_dicts.load(args.dataset)
    folder = args.output.with_suffix("")
    found = [
        detect(
            weights,
            args.dataset,
            folder / str(number),
            config_file=args.config_file,
            opts=args.opts,
        )
        for number, weights in enumerate(args.weights)
    ]
    teachers = []
    for file_name in [*args.results, *found]:
        teacher = load_teacher_boxes(loaded, file_name)
        print(teacher.report())
        teachers.append(teacher.boxes)
    merged = merge(teachers, iou=args.iou, most=args.most, threshold=args.threshold)
    results = as_results(merged, loaded)
    if not results:
        raise InputError(f"no teacher has a box with a score of {args.threshold:g} or more.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results))
    print(f"{args.output}: {merged.summary()}")
    evaluate(loaded.truth.to_coco(), read_results(str(args.output), loaded.truth).to_coco(), "bbox")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--coco", nargs=2, metavar=("JSON", "IMAGES"), help="the training dataset")
    source.add_argument("--dataset", help="name of the training dataset")
    parser.add_argument("--weights", nargs="+", default=[], help="checkpoints of this project")
    parser.add_argument("--config-file", help="for checkpoints without a configuration")
    parser.add_argument(
        "--results", nargs="+", default=[], help="image_id, category_id, bbox, score"
    )
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--threshold", type=float, default=0.05, help="minimum score of a box")
    parser.add_argument("--iou", type=float, default=0.2, help="largest IoU with a better box")
    parser.add_argument("--most", type=int, default=50, help="maximum boxes per image")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for the detectors"
    )
    args = parser.parse_args(arguments)
    setup_logger()  # shows how far a detector is
    try:
        run(args)
    except InputError as error:
        sys.exit(f"make_teacher_boxes.py: {error}")


if __name__ == "__main__":
    main()
