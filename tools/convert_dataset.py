#!/usr/bin/env python
"""Convert a dataset in YOLO's or Pascal VOC's format to COCO format.

    python tools/convert_dataset.py folder cells --output converted
    python tools/convert_dataset.py yolo images/train --names data.yaml --output train.json
    python tools/convert_dataset.py voc VOC2007 --split trainval --output trainval.json

`folder` recognises the layout like DATASETS.FOLDER and writes a file for each split; the others
convert one folder of images. Images are not copied. See docs/data.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from dn_detr.datasets.folder import read_folder
from dn_detr.datasets.voc import from_voc
from dn_detr.datasets.yolo import from_yolo, read_class_names
from dn_detr.errors import InputError


def convert_folder(args: argparse.Namespace) -> str:
    """Write a json file for each split of a folder; return a summary."""
    found, entries = read_folder(args.folder, args.images, args.annotations), []
    args.output.mkdir(parents=True, exist_ok=True)
    for split, (json_file, images) in found.files.items():
        target = args.output / f"{split}.json"
        shutil.copyfile(json_file, target)
        entries.append([f"my_{split}", str(target), images])
    return f'{found.sentence}. Use it as\n  DATASETS.COCO_FORMAT "{entries}"'


def convert(args: argparse.Namespace) -> str:
    """Write the json file; return a summary."""
    if args.format == "yolo":
        content = from_yolo(args.folder, read_class_names(args.names), args.labels)
        images = args.folder
    else:
        names = read_class_names(args.names) if args.names else None
        content = from_voc(
            args.folder, split=args.split, class_names=names, first_pixel=args.first_pixel
        )
        images = args.folder / "JPEGImages"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content), encoding="utf-8")
    return (
        f"wrote {args.output}: {len(content['images'])} images, {len(content['annotations'])} "
        f"objects, {len(content['categories'])} classes. Use it as\n"
        f"  DATASETS.COCO_FORMAT \"[['my_data', '{args.output}', '{images}']]\""
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    formats = parser.add_subparsers(dest="format", required=True)
    folder = formats.add_parser("folder", help="any dataset folder: the layout is recognised")
    folder.add_argument("folder", type=Path)
    folder.add_argument("--images", default="", help="folder of the images, if it is not found")
    folder.add_argument("--annotations", default="", help="folder, file or pattern of annotations")
    folder.add_argument("--output", type=Path, required=True, help="folder of the json files")
    yolo = formats.add_parser("yolo", help="a folder of images and a folder of text files")
    yolo.add_argument("folder", type=Path, help="the images")
    yolo.add_argument("--labels", type=Path, help="the text files; default: .../labels/...")
    yolo.add_argument("--names", type=Path, required=True, help="data.yaml, or a name on each line")
    voc = formats.add_parser("voc", help="a folder with Annotations and JPEGImages")
    voc.add_argument("folder", type=Path)
    voc.add_argument("--split", help="list in ImageSets/Main; default: all annotated images")
    voc.add_argument("--names", type=Path, help="order of the classes; default: alphabetical")
    voc.add_argument(
        "--first-pixel",
        type=int,
        choices=(0, 1),
        default=1,
        help="0: boxes are distances from the corner",
    )
    for subparser in (yolo, voc):
        subparser.add_argument("--output", type=Path, required=True, help="the json file")
    args = parser.parse_args(arguments)
    try:
        print(convert_folder(args) if args.format == "folder" else convert(args))
    except InputError as error:
        sys.exit(f"convert_dataset.py: {error}")
    except OSError as error:
        sys.exit(f"convert_dataset.py: the result cannot be written: {error}.")


if __name__ == "__main__":
    main()
