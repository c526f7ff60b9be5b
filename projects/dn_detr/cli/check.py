"""Check datasets: print the report that every training starts with, and what looks wrong.

    dn-detr check cells/
    dn-detr check --coco cells/train.json cells/images --write-cleaned cells/clean.json
    dn-detr check shapes_train shapes_val
    dn-detr check coco_2017_train --config dn_deformable

After the report come a table of objects by class and size, everything that looks wrong (boxes in
another format, doubled boxes, equal images in one dataset or in two, as in training and validation)
and the image files that cannot be used. --decode decodes every image and finds damage inside the
files as well; what was sound is remembered.

With --config, the datasets of the configuration can be used by name, and the report also checks the
number of queries and denoising groups and prints when mosaic and mixup are used (INPUT.SCHEDULE).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "datasets", nargs="*", metavar="FOLDER", help="dataset folder, or names of datasets"
    )
    parser.add_argument("--data", default="", metavar="FOLDER", help="the same for a folder")
    parser.add_argument("--images", default="", help="folder of the images, if it is not found")
    parser.add_argument("--annotations", default="", help="folder, file or pattern of annotations")
    parser.add_argument(
        "--coco",
        nargs=2,
        action="append",
        default=[],
        metavar=("JSON", "IMAGES"),
        help="a dataset by its paths",
    )
    parser.add_argument(
        "--write-cleaned",
        type=Path,
        metavar="JSON",
        help="write cleaned annotations of one dataset",
    )
    parser.add_argument("--decode", action="store_true", help="decode the pixels of every image")
    parser.add_argument("--config", dest="config_file", metavar="CONFIG")
    parser.set_defaults(opts=())


def run(args: argparse.Namespace) -> None:
    """Check."""
    from dn_detr.d2.data.check_data import run as check

    folders = [name for name in args.datasets if os.sep in name or os.path.exists(name)]
    if len(folders) == 1 and not args.data:
        args.data = folders[0]
        args.datasets.remove(folders[0])
    args.opts = list(args.opts)
    check(args)
