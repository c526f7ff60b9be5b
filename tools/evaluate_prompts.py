#!/usr/bin/env python
"""Evaluate box prompts: AP of the remaining objects, with and without prompts.

    python tools/evaluate_prompts.py --share 0.5 \
        MODEL.WEIGHTS output/prompted_dn_deformable/model_final.pth

A random share of the objects of every test image is passed to the detector as prompts, with boxes
and names. AP is computed over the others. In both cases the best detection that matches a prompted
object (same class, IoU at least 0.5) is ignored, so that detecting it again is not counted as an
error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import sys

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import BoxMode
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

from dn_detr.d2.data.catalog import class_names, prepare
from dn_detr.d2.data.dataset_dicts import load_annotations
from dn_detr.d2.inference.saved_detector import load_detector, weights_named
from dn_detr.detector import BoxPrompts, DetectedObjects, Detector
from dn_detr.errors import InputError

METRICS = ("AP", "AP50", "AP75")
MATCHES = 0.5  # IoU from which a detection is one of a given object


def without_given(found: DetectedObjects, boxes: np.ndarray, labels: np.ndarray) -> list[int]:
    """Return the indices of detections without those of prompted objects.

    For each prompted object the best overlapping detection of its class is removed.
    """
    stays = np.ones(len(found), bool)
    overlaps = box_iou(torch.from_numpy(boxes), torch.from_numpy(found.boxes_xyxy_px)).numpy()
    for overlap, label in zip(overlaps, labels, strict=True):
        matches = stays & (found.labels == label) & (overlap >= MATCHES)
        if matches.any():
            stays[matches.argmax()] = False  # the first is the best
    return np.flatnonzero(stays).tolist()


def average_precision(images: list[dict], objects: list[dict], found: list[dict], num: int) -> dict:
    """Return COCO AP, AP50 and AP75 in percent of the boxes `found` for `objects`."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": images,
            "annotations": objects,
            "categories": [{"id": label, "name": str(label)} for label in range(num)],
        }
        truth.createIndex()
        if not found:
            return dict.fromkeys(METRICS, 0.0)
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: 100 * float(evaluation.stats[i]) for i, name in enumerate(METRICS)}


def as_result(image: int, box: np.ndarray, label: int, **more) -> dict:
    x0, y0, x1, y1 = map(float, box)
    size = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
    return {"image_id": image, "category_id": int(label), "iscrowd": 0, **size, **more}


def evaluate(
    detector: Detector, records: list[dict], *, share: float, seed: int
) -> tuple[dict[str, dict], int, int]:
    """Return metrics of the other objects without and with prompts, and numbers of objects.

    The numbers are those of prompted and of other objects.
    """
    images, others, num_given = [], [], 0
    results: dict[str, list[dict]] = {"without prompts": [], "with prompts": []}
    names = detector.class_names
    for image, record in enumerate(records):
        objects = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
        boxes = np.array(boxes, np.float32).reshape(-1, 4)
        labels = np.array([a["category_id"] for a in objects], np.int64)
        draw = np.random.default_rng((seed, image))
        order = draw.permutation(len(objects))
        count = int(share * len(objects) + draw.random())  # share on average, also of odd numbers
        given, rest = order[:count], order[count:]
        num_given += count
        images.append({"id": image, "width": record["width"], "height": record["height"]})
        others += [
            as_result(image, boxes[i], labels[i], id=len(others) + n + 1)
            for n, i in enumerate(rest)
        ]
        prompts = BoxPrompts(boxes[given], [names[label] for label in labels[given]])
        path = record["file_name"]
        for kind in results:
            found = detector(
                path, threshold=0.0, prompts=prompts if kind == "with prompts" else None
            )
            first = count if kind == "with prompts" else 0
            found = DetectedObjects(
                found.boxes_xyxy_px[first:], found.scores[first:], found.labels[first:], []
            )
            for i in without_given(found, boxes[given], labels[given]):
                results[kind].append(
                    as_result(
                        image, found.boxes_xyxy_px[i], found.labels[i], score=float(found.scores[i])
                    )
                )
    metrics = {
        kind: average_precision(images, others, found, len(names))
        for kind, found in results.items()
    }
    return metrics, num_given, len(others)


def detector_and_records(opts: list[str]) -> tuple[Detector, list[dict], str]:
    saved = load_detector(weights_named(None, opts), opts=opts)
    cfg: CfgNode = saved.cfg.clone()
    cfg.defrost()
    prepare(cfg, eval_only=True)
    name = cfg.DATASETS.TEST[0]
    if class_names(name) != saved.class_names:
        raise InputError(f"the dataset {name!r} has different classes than the detector.")
    inputs = cfg.INPUT
    detector = Detector(
        saved.model,
        class_names=saved.class_names,
        input_format=inputs.FORMAT,
        min_size=inputs.MIN_SIZE_TEST,
        max_size=inputs.MAX_SIZE_TEST,
    )
    return detector, load_annotations(name).records, name


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--share", type=float, default=0.5, help="share of the objects to pass as prompts"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of their choice")
    parser.add_argument("--num-images", type=int, help="use only the first images")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs, including MODEL.WEIGHTS")
    args = parser.parse_args(arguments)
    try:
        if not 0 <= args.share <= 1:
            raise InputError(f"--share must be in [0, 1], got {args.share}.")
        detector, records, name = detector_and_records(args.opts)
        records = list(itertools.islice(records, args.num_images))
        metrics, given, others = evaluate(detector, records, share=args.share, seed=args.seed)
    except InputError as error:
        sys.exit(f"evaluate_prompts.py: {error}")
    print(f"{name}: {len(records)} images, {given} objects as prompts, AP of the other {others}:")
    print(f"| | {' | '.join(METRICS)} |\n|---|{'---|' * len(METRICS)}")
    for kind, values in metrics.items():
        print(f"| {kind} | {' | '.join(f'{values[metric]:.1f}' for metric in METRICS)} |")


if __name__ == "__main__":
    main()
