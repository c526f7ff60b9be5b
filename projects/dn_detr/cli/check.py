"""Check the datasets of a training: print the report that it starts with.

dn-detr check cells/
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("folder", metavar="FOLDER", help="dataset: COCO, YOLO or Pascal VOC")
    parser.set_defaults(opts=())


def run(args: argparse.Namespace) -> None:
    """Print the report."""
    from dn_detr.d2.config.defaults import default_config, merge_opts
    from dn_detr.d2.data.catalog import prepare
    from dn_detr.d2.data.summary import check_datasets

    cfg = default_config()
    merge_opts(cfg, ["DATASETS.FOLDER", args.folder, *args.opts])
    prepare(cfg)
    for report in check_datasets(cfg):
        print(report)
