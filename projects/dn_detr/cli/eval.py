"""Evaluate trained weights.

    dn-detr eval --weights output/cells/model_best.pth --data cells/
    dn-detr eval --weights output/cells/model_best.pth --report

Without --data the test dataset of the training is used. Results are written to the folder of the
weights, unless --output names another one.
"""

from __future__ import annotations

import argparse

from dn_detr.cli.common import add_config, at_least, pairs_of
from dn_detr.cli.train import add_processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_config(parser, "for checkpoints without configuration")
    parser.add_argument("--weights", metavar="FILE", help="trained checkpoint")
    parser.add_argument("--data", metavar="FOLDER", help="dataset: its val, else its test images")
    parser.add_argument("--output", metavar="FOLDER", help="default: that of the weights")
    parser.add_argument("--report", action="store_true", help="write an HTML report as well")
    parser.add_argument("--batch", type=at_least(1), help="images at a time, over all GPUs")
    parser.add_argument("--workers", type=at_least(0), help="processes that read images, per GPU")
    add_processes(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluate."""
    from dn_detr.d2.engine import launch
    from dn_detr.errors import InputError

    args.opts = pairs_of(args, "data", "weights", "output", "batch", "workers")
    if args.report:
        args.opts += ["TEST.REPORT", "True"]
    if "MODEL.WEIGHTS" not in args.opts[::2]:
        raise InputError("an evaluation needs weights: --weights FILE.")
    args.config_file, args.eval_only = args.config or "", True
    args.resume = args.overwrite = False
    launch.run(args)
