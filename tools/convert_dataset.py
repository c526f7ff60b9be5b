#!/usr/bin/env python
"""Convert a dataset in YOLO's or Pascal VOC's format to COCO format.

    python tools/convert_dataset.py yolo images/train --names data.yaml --output train.json
    python tools/convert_dataset.py voc VOC2007 --split trainval --output trainval.json

Images are not copied: the image folder is the given one for YOLO, and JPEGImages for VOC. See
docs/data.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dn_detr.datasets.voc import from_voc
from dn_detr.datasets.yolo import from_yolo, read_class_names
from dn_detr.errors import InputError


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
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        raise InputError(f"the result cannot be written: {error}.") from error
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
    try:
        print(convert(parser.parse_args(arguments)))
    except InputError as error:
        sys.exit(f"convert_dataset.py: {error}")


if __name__ == "__main__":
    main()
