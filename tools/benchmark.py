#!/usr/bin/env python
"""Measure the time of training steps, inference, data loading or an exported file.

    python tools/benchmark.py --task train --config-file configs/dn_deformable.yaml --batch 2
    python tools/benchmark.py --task eval --config-file configs/dn_detr.yaml --size 800x1066
    python tools/benchmark.py --task data --config-file configs/dn_detr.yaml
    python tools/benchmark.py --task export --exported detector.onnx --size 800x1088

Weights are random and images are noise, which does not affect times. Only --task data reads the
dataset of the configuration. Warm-up iterations are not counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import dn_detr.d2  # noqa: F401
from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.data.catalog import prepare
from dn_detr.d2.data.loader import build_train_loader
from dn_detr.d2.engine.activation_checkpointing import recompute
from dn_detr.d2.engine.compile import compile_core
from dn_detr.d2.engine.train_step import TrainStep
from dn_detr.d2.export import exporter
from dn_detr.d2.solver.optimizer import build_optimizer
from dn_detr.errors import InputError


def sample(index: int, num_objects: int, num_classes: int, size: tuple[int, int]) -> dict:
    """Make an image of noise with boxes, as a Detectron2 sample."""
    height, width = size
    generator = torch.Generator().manual_seed(index)
    corners = torch.rand(num_objects, 2, 2, generator=generator).sort(dim=1).values.flatten(1)
    instances = Instances(size)
    corners = corners * torch.tensor([width - 2, height - 2] * 2) + torch.tensor([0, 0, 2, 2])
    instances.gt_boxes = Boxes(corners)  # of at least two pixels
    instances.gt_classes = torch.randint(num_classes, (num_objects,), generator=generator)
    image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances, "image_id": index}


def train_task(cfg, args) -> Callable[[], None]:
    """A training step: forward, matching, losses, backward, optimizer."""
    batch = [
        sample(index, args.objects, cfg.MODEL.DN_DETR.NUM_CLASSES, args.size)
        for index in range(args.batch)
    ]
    model = build_model(cfg).train()
    recompute(model, cfg.MODEL.DN_DETR.RECOMPUTE)
    if cfg.MODEL.DN_DETR.COMPILE:
        compile_core(model.core, cfg.MODEL.DN_DETR.COMPILE)
    step = TrainStep(
        model,
        [batch] * (args.warmup + args.iterations),
        build_optimizer(cfg, model),
        precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else None,
        seed=0,
    )
    return step.run_step


def eval_task(cfg, args) -> Callable[[], None]:
    """Inference, from images on the host to detections."""
    model = build_model(cfg).eval()
    batch = [sample(index, 0, 1, args.size) for index in range(args.batch)]
    precision = {"bfloat16": torch.bfloat16, "float16": torch.float16}[cfg.SOLVER.AMP.PRECISION]

    @torch.inference_mode()
    def run() -> None:
        with torch.autocast(model.device.type, precision, enabled=cfg.SOLVER.AMP.ENABLED):
            model(batch)

    return run


def data_task(cfg, args) -> Callable[[], None]:
    """A batch of the training data, read and augmented."""
    prepare(cfg)
    cfg.SOLVER.IMS_PER_BATCH = args.batch
    batches = iter(build_train_loader(cfg))
    return lambda: next(batches)


def export_task(args) -> Callable[[], None]:
    """A file of tools/export.py, on the CPU."""
    kinds = {suffix: kind for kind, suffix in exporter.FORMATS.items()}
    if args.exported is None or args.exported.suffix not in kinds:
        raise InputError(f"--task export needs --exported, a file ending in {' or '.join(kinds)}.")
    run = torch.inference_mode()(exporter.load(args.exported, kinds[args.exported.suffix]))
    inputs = exporter.example(args.batch, *args.size)
    return lambda: run(*inputs)


def measure(run: Callable[[], None], *, warmup: int, iterations: int, is_cuda: bool) -> list[float]:
    """Return the seconds of each iteration after the warm-up."""
    seconds = []
    with EventStorage():
        for _ in range(warmup + iterations):
            start = time.perf_counter()
            run()
            if is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return seconds[warmup:]


def summarize(seconds: list[float], args, is_cuda: bool) -> dict:
    """Return the results to print and write."""
    median = statistics.median(seconds)
    ordered = sorted(seconds)
    result = {
        "task": args.task,
        "of": args.config_file or str(args.exported),
        "batch": args.batch,
        "size": None if args.task == "data" else "x".join(map(str, args.size)),
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "iterations": len(seconds),
        "median_ms": 1000 * median,
        "fastest_ms": 1000 * ordered[0],
        "slowest_tenth_ms": 1000 * ordered[int(0.9 * len(ordered))],
        "images_per_second": args.batch / median,
    }
    if is_cuda:
        result["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return result


def two_sides(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["train", "eval", "data", "export"], required=True)
    parser.add_argument("--config-file")
    parser.add_argument("--exported", type=Path, help="file of tools/export.py, for --task export")
    parser.add_argument("--batch", type=int, default=1, help="batch size")
    parser.add_argument("--size", type=two_sides, default=(800, 1066), metavar="HEIGHTxWIDTH")
    parser.add_argument(
        "--objects", type=int, default=7, help="objects per image; COCO's mean is 7"
    )
    parser.add_argument("--warmup", type=int, default=5, help="iterations that are not counted")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs, e.g. SOLVER.AMP.ENABLED True")
    args = parser.parse_args()
    is_cuda = args.task in ("train", "eval") and torch.cuda.is_available()
    try:
        if args.task == "export":
            run = export_task(args)
        else:
            cfg = read_config(args.config_file, args.opts)
            cfg.MODEL.DEVICE = "cuda" if is_cuda else "cpu"
            cfg.MODEL.WEIGHTS, cfg.MODEL.DN_DETR.BACKBONE_PRETRAINED = "", False
            if args.task != "data":
                cfg.MODEL.DN_DETR.NUM_CLASSES = cfg.MODEL.DN_DETR.NUM_CLASSES or 80
            run = {"train": train_task, "eval": eval_task, "data": data_task}[args.task](cfg, args)
        seconds = measure(run, warmup=args.warmup, iterations=args.iterations, is_cuda=is_cuda)
    except InputError as error:
        sys.exit(f"benchmark.py: {error}")
    result = summarize(seconds, args, is_cuda)
    for name, value in result.items():
        print(f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
