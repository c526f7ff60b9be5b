"""Convert a checkpoint of the authors, of detrex or of Hugging Face.

    python tools/convert_checkpoint.py --method dab_detr checkpoint.pth dn_detr_r50.pth \
        --classes coco80 --config-file configs/dn_detr.yaml

No code from the checkpoint is executed. Conversion fails if any parameter is left unmatched, and
lists it. The result is evaluated with the authors' treatment of padding (`models.published`). With
--config-file it also holds this configuration, after a test that it fits the parameters, and
`train_net.py --eval-only`, `tools/demo.py` and `dn_detr.Detector` need nothing else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from dn_detr.conversion.convert_weights import convert, keep_coco_classes
from dn_detr.conversion.safe_load import read_parameters
from dn_detr.conversion.tables import TABLES
from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.engine.checkpoint import DETECTOR, FORMAT
from dn_detr.d2.inference.saved_detector import load_detector
from dn_detr.errors import InputError

COCO80 = [category["name"] for category in COCO_CATEGORIES if category["isthing"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="the file to read (.pth, .pt, .bin, .safetensors, .pkl)")
    parser.add_argument("destination", type=Path, help="the file to write (.pth)")
    parser.add_argument(
        "--method", required=True, choices=sorted(TABLES), help="method of the checkpoint"
    )
    parser.add_argument(
        "--classes",
        choices=("keep", "coco80"),
        default="keep",
        help="coco80: name COCO's 80 categories, selected from the raw ids 0 to 90 if need be",
    )
    parser.add_argument(
        "--config-file", help="configuration of this model, kept in the converted checkpoint"
    )
    args = parser.parse_args()
    try:
        state = read_parameters(args.source)
        ours, table = convert(state, args.method)
        about = {"format": FORMAT, "as_published": True}
        if args.classes == "coco80":
            ours = keep_coco_classes(ours, table.empty_classes)
            about["class_names"] = COCO80
        if args.config_file:
            about["config"] = described_by(args.config_file, args.method, about)
    except OSError as error:
        sys.exit(f"convert_checkpoint.py: {args.source} cannot be read: {error.strerror}.")
    except InputError as error:
        sys.exit(f"convert_checkpoint.py: {error}")
    except ValueError as error:
        sys.exit(f"convert_checkpoint.py: {args.source}: {error}.")
    ours = {name: tensor.contiguous().clone() for name, tensor in ours.items()}
    args.destination.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": ours, DETECTOR: about}, args.destination)
    if args.config_file:
        try:
            load_detector(str(args.destination), device="cpu")
        except InputError as error:
            args.destination.unlink()
            sys.exit(f"convert_checkpoint.py: {args.config_file} does not fit: {error}")
    print(
        f"{args.source}: {len(state)} tensors with the names of {table.source} "
        f"-> {args.destination}: {len(ours)} tensors"
    )


def described_by(config_file: str, method: str, about: dict) -> str:
    """Return the configuration as YAML, with the classes of `about` and as published.

    Raises:
        InputError: if it is of another method or leaves the classes open.
    """
    cfg = read_config(config_file, [])
    node = cfg.MODEL.DN_DETR
    if method != node.METHOD:
        raise InputError(f"{config_file} is of the method {node.METHOD}, not {method}.")
    if "class_names" not in about:
        raise InputError("--config-file needs class names: add --classes coco80.")
    node.NUM_CLASSES, node.AS_PUBLISHED, cfg.MODEL.WEIGHTS = len(COCO80), True, ""
    return cfg.dump()


if __name__ == "__main__":
    main()
