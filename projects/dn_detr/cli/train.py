"""Train a detector.

    dn-detr train dn_deformable --data cells/ --epochs 50
    dn-detr train quick/dn_deformable --data cells/ --recipe auto --output output/cells
    dn-detr train --resume --output output/cells

All GPUs are used that share a batch evenly, or the CPU. If the batch is not the one that the
configuration was written for, the learning rate follows it: with the square root for AdamW, in
proportion for SGD; SOLVER.BASE_LR fixes it. The best weights of all evaluations are kept in
model_best.pth. train_net.py does the same with Detectron2's defaults.
"""

from __future__ import annotations

import argparse
import os

from dn_detr.cli.common import add_config, at_least, pairs_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_config(parser, "name or path; --resume takes that of the output folder by default")
    parser.add_argument("--data", metavar="FOLDER", help="dataset: COCO, YOLO or Pascal VOC")
    parser.add_argument("--epochs", type=at_least(0, float), help="default: as configured")
    parser.add_argument("--batch", type=at_least(1), help="images in a step, over all GPUs")
    parser.add_argument(
        "--recipe", choices=["auto"], help="choose sizes, queries, batch and epochs by the data"
    )
    parser.add_argument("--weights", metavar="FILE", help="start from this detector or backbone")
    parser.add_argument("--output", metavar="FOLDER", help="default: OUTPUT_DIR as configured")
    parser.add_argument("--resume", action="store_true", help="continue the training in --output")
    parser.add_argument(
        "--overwrite", action="store_true", help="discard an earlier training in --output"
    )
    parser.add_argument("--workers", type=at_least(0), help="processes that read images, per GPU")
    add_processes(parser)


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add the number of GPUs and machines."""
    parser.add_argument("--num-gpus", type=at_least(0), help="default: all; 0: the CPU")
    parser.add_argument("--num-machines", type=at_least(1), default=1)
    parser.add_argument("--machine-rank", type=at_least(0), default=0)
    parser.add_argument("--dist-url", default="auto", help="tcp://ADDRESS:PORT of machine 0")


def run(args: argparse.Namespace) -> None:
    """Train."""
    from dn_detr.d2.engine import launch
    from dn_detr.errors import InputError

    config = args.config
    if config is None and args.resume:
        pairs = dict(zip(args.opts[::2], args.opts[1::2], strict=True))
        folder = args.output or pairs.get("OUTPUT_DIR", "output")
        config = os.path.join(folder, "config.yaml")
        if not os.path.isfile(config):
            raise InputError(f"there is no training to resume in {folder!r}: name its --output.")
    if config is None:
        raise InputError("name a configuration, e.g. dn-detr train dn_deformable --data FOLDER.")
    args.config_file, args.eval_only, args.adapts = config, False, True
    args.opts = pairs_of(args, "data", "weights", "output", "epochs", "batch", "workers")
    launch.run(args)
