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

from dn_detr.conversion.tables import TABLES
from dn_detr.d2.inference.convert_file import convert_file
from dn_detr.errors import InputError


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
        done = convert_file(
            args.source,
            args.destination,
            args.method,
            is_coco=args.classes == "coco80",
            config_file=args.config_file,
        )
    except InputError as error:
        sys.exit(f"convert_checkpoint.py: {error}")
    print(done)


if __name__ == "__main__":
    main()
