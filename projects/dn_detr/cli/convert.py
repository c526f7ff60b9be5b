r"""Convert weights of the authors, of detrex or of Hugging Face, or a dataset to COCO format.

    dn-detr convert weights checkpoint.pth --method dab_detr --classes coco80 \
        --config dn_detr --output dn_detr_r50.pth
    dn-detr convert folder cells --output converted
    dn-detr convert yolo images/train --names data.yaml --output train.json
    dn-detr convert voc VOC2007 --split trainval --output trainval.json

No code from a checkpoint is executed. Conversion fails if any parameter is left unmatched, and
lists it. The result is evaluated with the authors' treatment of padding (`models.published`). With
--config it also holds this configuration, after a test that it fits, and needs nothing else.

`folder` recognises the layout like --data and writes a json file for each split; `yolo` and `voc`
convert one folder of images. Images are not copied. See docs/data.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    kinds = parser.add_subparsers(dest="kind", required=True)
    weights = kinds.add_parser("weights", help="a checkpoint of another project")
    weights.add_argument("source", help="file to read (.pth, .pt, .bin, .safetensors, .pkl)")
    weights.add_argument("--output", type=Path, required=True, help="file to write (.pth)")
    weights.add_argument("--method", required=True, help="method of the checkpoint")
    weights.add_argument(
        "--classes",
        choices=["keep", "coco80"],
        default="keep",
        help="coco80: select COCO's 80 categories from the raw ids 0 to 90, and name them",
    )
    weights.add_argument("--config", help="configuration of this model, kept in the result")
    folder = kinds.add_parser("folder", help="any dataset folder: the layout is recognised")
    folder.add_argument("folder", type=Path)
    folder.add_argument("--images", default="", help="folder of the images, if it is not found")
    folder.add_argument("--annotations", default="", help="folder, file or pattern of annotations")
    folder.add_argument("--output", type=Path, required=True, help="folder of the json files")
    yolo = kinds.add_parser("yolo", help="a folder of images and a folder of text files")
    yolo.add_argument("folder", type=Path, help="the images")
    yolo.add_argument("--labels", type=Path, help="the text files; default: .../labels/...")
    yolo.add_argument("--names", type=Path, required=True, help="data.yaml, or a name on each line")
    voc = kinds.add_parser("voc", help="a folder with Annotations and JPEGImages")
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
    for part in (yolo, voc):
        part.add_argument("--output", type=Path, required=True, help="the json file")


def run(args: argparse.Namespace) -> None:
    """Convert."""
    from dn_detr.errors import InputError

    try:
        print(_convert(args))
    except OSError as error:
        raise InputError(f"the result cannot be written: {error}.") from error


def _convert(args: argparse.Namespace) -> str:
    from dn_detr.datasets import to_coco

    if args.kind == "folder":
        given = {"images": args.images, "annotations": args.annotations}
        return to_coco.convert_folder(args.folder, args.output, **given)
    if args.kind == "yolo":
        return to_coco.convert_yolo(args.folder, args.output, args.names, args.labels)
    if args.kind == "voc":
        given = {"split": args.split, "names": args.names, "first_pixel": args.first_pixel}
        return to_coco.convert_voc(args.folder, args.output, **given)
    from dn_detr.conversion.tables import TABLES
    from dn_detr.d2.inference.convert_file import convert_file
    from dn_detr.errors import InputError

    if args.method not in TABLES:
        raise InputError(f"--method must be one of {', '.join(sorted(TABLES))}.")
    is_coco = args.classes == "coco80"
    given = {"method": args.method, "is_coco": is_coco, "config_file": args.config}
    return convert_file(args.source, args.output, **given)
