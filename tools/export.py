#!/usr/bin/env python
"""Export a trained detector to a file that runs without this project.

    python tools/export.py --weights output/dn_deformable/model_final.pth --output detector.onnx
    python tools/export.py --config-file configs/dn_detr.yaml --weights dn_detr_r50.pth \
        --format torch-export --output detector.pt2

The file maps batches of images of any size to boxes, scores and labels (docs/export.md). It is
compared with the model on batches and sizes that were not traced, and deleted if it differs.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from dn_detr.d2.export import exporter
from dn_detr.d2.inference.saved_detector import load_detector
from dn_detr.errors import InputError

OF_TORCH = (r"`isinstance\(treespec, LeafSpec\)` is deprecated", "The given buffer is not writable")
"""Warnings of what torch does itself while it writes and reads the file."""


def main() -> None:
    for message in OF_TORCH:
        warnings.filterwarnings("ignore", message=message)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="checkpoint")
    parser.add_argument("--config-file", help="for checkpoints without a configuration")
    parser.add_argument("--format", choices=exporter.FORMATS, default="onnx")
    parser.add_argument("--output", type=Path, help="default: next to the weights")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs, e.g. INPUT.MIN_SIZE_TEST 640")
    args = parser.parse_args()
    try:
        if args.format == "onnx":
            exporter.need_onnx()
        saved = load_detector(
            args.weights, config_file=args.config_file, opts=args.opts, device="cpu"
        )
        output = args.output or Path(args.weights).with_suffix(exporter.FORMATS[args.format])
        about = exporter.metadata(saved.cfg, saved.class_names, saved.model)
        differences = exporter.export(saved.model, output, args.format, about)
    except InputError as error:
        sys.exit(f"export.py: {error}")
    for found in differences:
        print(found)
    print(f"wrote {output} ({output.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
