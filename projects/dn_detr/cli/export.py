"""Export a trained detector to a file that runs without this project.

    dn-detr export --weights output/cells/model_best.pth --output detector.onnx
    dn-detr export --weights model.pth --format torch-export --output detector.pt2

The file maps batches of images of any size to boxes, scores and labels (docs/export.md). It is
compared with the model on batches and sizes that were not traced, and deleted if it differs.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from dn_detr.cli.common import add_detector

OF_TORCH = (r"`isinstance\(treespec, LeafSpec\)` is deprecated", "The given buffer is not writable")
"""Warnings of what torch does itself while it writes and reads the file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_detector(parser)
    parser.add_argument("--format", choices=["onnx", "torch-export"], default="onnx")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: beside the weights")


def run(args: argparse.Namespace) -> None:
    """Export."""
    from dn_detr.d2.export import exporter
    from dn_detr.d2.inference.saved_detector import load_detector

    for message in OF_TORCH:
        warnings.filterwarnings("ignore", message=message)
    if args.format == "onnx":
        exporter.need_onnx()
    saved = load_detector(args.weights, config_file=args.config, opts=args.opts, device="cpu")
    output = args.output or Path(args.weights).with_suffix(exporter.FORMATS[args.format])
    about = exporter.metadata(saved.cfg, saved.class_names, saved.model)
    for found in exporter.export(saved.model, output, args.format, about):
        print(found)
    print(f"wrote {output} ({output.stat().st_size / 2**20:.1f} MiB)")
