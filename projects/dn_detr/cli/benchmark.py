"""Measure the time of training steps, inference, data loading or an exported file.

    dn-detr benchmark dn_deformable --task train --batch 2
    dn-detr benchmark dn_detr --task eval --size 800x1066
    dn-detr benchmark dn_detr --task data
    dn-detr benchmark --task export --exported detector.onnx --size 800x1088

Weights are random and images are noise, which does not affect times. Only --task data reads the
dataset of the configuration. Warm-up iterations are not counted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dn_detr.cli.common import add_config, at_least, height_and_width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_config(parser, "name or path, for all tasks but export")
    parser.add_argument("--task", choices=["train", "eval", "data", "export"], default="eval")
    parser.add_argument("--exported", metavar="FILE", help="of dn-detr export, for --task export")
    parser.add_argument("--batch", type=at_least(1), default=1, help="images at a time")
    parser.add_argument(
        "--size", type=height_and_width, default=(800, 1066), metavar="HEIGHTxWIDTH"
    )
    parser.add_argument(
        "--objects", type=at_least(0), default=7, help="per image; COCO's mean is 7"
    )
    parser.add_argument("--warmup", type=at_least(0), default=5, help="iterations not counted")
    parser.add_argument("--iterations", type=at_least(1), default=20)
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the result here")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    from dn_detr.d2.engine.benchmark import Workload, benchmark

    names = ("batch", "size", "objects", "warmup", "iterations")
    load = Workload(**{name: getattr(args, name) for name in names})
    result = benchmark(args.task, load, config=args.config, opts=args.opts, exported=args.exported)
    for name, value in result.items():
        print(f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
