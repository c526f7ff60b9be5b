"""Convert a checkpoint of the authors, of detrex or of Hugging Face.

    python tools/convert_checkpoint.py --method dab_detr checkpoint.pth dn_detr_r50.pth

No code from the checkpoint is executed. Conversion fails if any parameter is left unmatched, and
lists it. Pass the result as MODEL.WEIGHTS.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from dn_detr.conversion.convert_weights import convert, keep_coco_classes
from dn_detr.conversion.safe_load import read_parameters
from dn_detr.conversion.tables import TABLES


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
        help="coco80: select COCO's 80 categories from the raw ids 0 to 90",
    )
    args = parser.parse_args()
    try:
        state = read_parameters(args.source)
        ours, table = convert(state, args.method)
        if args.classes == "coco80":
            ours = keep_coco_classes(ours)
    except OSError as error:
        sys.exit(f"convert_checkpoint.py: {args.source} cannot be read: {error.strerror}.")
    except ValueError as error:
        sys.exit(f"convert_checkpoint.py: {args.source}: {error}.")
    ours = {name: tensor.contiguous().clone() for name, tensor in ours.items()}
    args.destination.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": ours}, args.destination)
    print(
        f"{args.source}: {len(state)} tensors with the names of {table.source} "
        f"-> {args.destination}: {len(ours)} tensors"
    )


if __name__ == "__main__":
    main()
