"""Evaluate trained weights, or results of any detector in COCO format.

    dn-detr eval --weights output/cells/model_best.pth --data cells/
    dn-detr eval --weights output/cells/model_best.pth --report
    dn-detr eval --results results.json --coco cells/val.json cells/images --output report/

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
    parser.add_argument("--results", metavar="JSON", help="image_id, category_id, bbox, score")
    parser.add_argument(
        "--coco", nargs=2, metavar=("JSON", "IMAGES"), help="ground truth of --results"
    )
    parser.add_argument("--dataset", metavar="NAME", help="the same, by name")
    parser.add_argument(
        "--limit", type=at_least(1), default=100, help="of --results: detections of a class counted"
    )
    parser.add_argument("--report", action="store_true", help="write an HTML report as well")
    parser.add_argument("--batch", type=at_least(1), help="images at a time, over all GPUs")
    parser.add_argument("--workers", type=at_least(0), help="processes that read images, per GPU")
    add_processes(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluate."""
    from dn_detr.d2.engine import launch
    from dn_detr.errors import InputError

    if args.results:
        from dn_detr.d2.evaluation.results import evaluate_results

        if not (args.coco or args.dataset or args.data):
            raise InputError("--results needs ground truth: --data, --coco or --dataset.")
        report = evaluate_results(
            args.results,
            args.output or "report",
            coco=args.coco or (),
            folder=args.data or "",
            dataset=args.dataset or "",
            limit=args.limit,
        )
        print(f"wrote {report}")
        return
    args.opts = pairs_of(args, "data", "weights", "output", "batch", "workers")
    if args.report:
        args.opts += ["TEST.REPORT", "True"]
    if "MODEL.WEIGHTS" not in args.opts[::2]:
        raise InputError("an evaluation needs weights: --weights FILE.")
    args.config_file, args.eval_only = args.config or "", True
    args.resume = args.overwrite = False
    launch.run(args)
