r"""Convert weights of the authors, of detrex or of Hugging Face, or a dataset to COCO format.

    dn-detr convert weights checkpoint.pth --method dab_detr --classes coco80 \
        --config dn_detr --output dn_detr_r50.pth

No code from a checkpoint is executed. Conversion fails if any parameter is left unmatched, and
lists it. The result is evaluated with the authors' treatment of padding (`models.published`). With
--config it also holds this configuration, after a test that it fits, and needs nothing else.
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


def run(args: argparse.Namespace) -> None:
    """Convert."""
    from dn_detr.conversion.tables import TABLES
    from dn_detr.d2.inference.converted import convert_file
    from dn_detr.errors import InputError

    if args.method not in TABLES:
        raise InputError(f"--method must be one of {', '.join(sorted(TABLES))}.")
    options = {"method": args.method, "classes": args.classes, "config": args.config}
    print(convert_file(args.source, args.output, **options))
