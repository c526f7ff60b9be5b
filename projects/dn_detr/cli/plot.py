"""Plot losses and AP of one or several trainings.

dn-detr plot output/cells --output curves.png
dn-detr plot denoised=output/a plain=output/b --output comparison.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dn_detr.cli.common import picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output folder or metrics.json, or label=folder"
    )
    parser.add_argument("--output", type=picture, default=Path("curves.png"))


def run(args: argparse.Namespace) -> None:
    """Plot."""
    from dn_detr.d2.evaluation.curves import plot

    plot(args.runs, args.output)
    print(f"wrote {args.output}")
