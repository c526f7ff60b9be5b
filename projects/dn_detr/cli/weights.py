"""List the weights that others publish for these methods, or fetch and convert some by name.

    dn-detr weights
    dn-detr weights detrex-dn-detr-r50-50ep --output dn_detr_r50.pth

None of them was tried here. Downloads go on where they were interrupted, are checked where a hash
is published, and are kept in ~/.cache/dn_detr (DN_DETR_CACHE). MODEL.WEIGHTS and --weights take the
names as well.
"""

from __future__ import annotations

import argparse
import shutil
from itertools import groupby
from pathlib import Path

from dn_detr.conversion.published_weights import (
    PublishedWeights,
    catalogue,
    find_weights,
    published_hash,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("name", nargs="?", help="which weights to fetch; without: list all")
    parser.add_argument("--output", type=Path, metavar="FILE", help="copy them to this file (.pth)")


def run(args: argparse.Namespace) -> None:
    """List the catalogue, or fetch the weights `args.name`.

    Raises:
        InputError: If they cannot be fetched or converted.
    """
    if args.name is None:
        return print_catalogue()
    weights = find_weights(args.name)
    print(
        f"{weights.name}: {weights.address}, published in {weights.file} of {weights.repository} "
        f"at commit {weights.commit[:8]}. Licence: {weights.licence}. AP {weights.ap} as "
        "published, not tried here."
    )
    from dn_detr.d2.inference.convert_file import fetch_converted  # imports torch

    path = fetch_converted(weights.name)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        path = shutil.copyfile(path, args.output)
    print(f"converted: {path}")


def print_catalogue() -> None:
    """Print all published weights, grouped by the file that names their addresses."""

    def source(weights: PublishedWeights) -> tuple[str, ...]:
        return weights.repository, weights.file, weights.commit, weights.licence

    print("Published weights, not tried here. AP on COCO val2017 as published.")
    for (repository, file, commit, licence), group in groupby(catalogue().values(), key=source):
        print(f"\n{repository}, {file} at commit {commit[:8]}. Licence: {licence}")
        for weights in group:
            notes = [
                weights.config or f"{weights.method}, cannot be converted",
                f"AP {weights.ap}",
                weights.format.removeprefix(".") or "download by hand",
                *filter(None, [published_hash(weights.address) and "hash published"]),
            ]
            print(f"  {weights.name}: {'; '.join(notes)}\n    {weights.address}")
