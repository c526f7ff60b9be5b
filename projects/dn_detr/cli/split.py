"""Divide a dataset folder into training and validation, so that every class is in both.

    dn-detr split cells/
    dn-detr split cells/ --output divided/

What is drawn is written to dn_detr_split.json in the folder, and used by every later command;
delete this file for another split. Folders that are divided already keep their split. --output
writes COCO json files of the parts as well.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("folder", metavar="FOLDER", help="dataset: COCO, YOLO or Pascal VOC")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write train.json, val.json")


def run(args: argparse.Namespace) -> None:
    """Divide."""
    from dn_detr.datasets.folder import read_folder

    found = read_folder(args.folder)
    print(found.sentence)
    for split, (json_file, images) in found.files.items() if args.output else ():
        args.output.mkdir(parents=True, exist_ok=True)
        target = args.output / f"{split}.json"
        if not (target.exists() and target.samefile(json_file)):
            shutil.copyfile(json_file, target)
        print(f"wrote {target}, for the images in {images}")
