#!/usr/bin/env python
"""Measure time and memory of auxiliary queries and losses in training.

    python benchmarks/auxiliary_queries.py --configs configs/quick --batch 4 --size 160 213 --save
    python benchmarks/auxiliary_queries.py --device cuda --host DAB-Deformable --batch 8

Steps and memory as in train_step.py, with and without auxiliary queries. Mosaic and mixup (dense
O2O) cost the detector only through more objects, here four times as many. Needs Detectron2.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from common import make_parser, save, table
from train_step import OBJECTS, Case, measure

DAB, DN = "dab_deformable.yaml", "dn_deformable.yaml"
HOSTS = {
    "DAB-Deformable": {
        "plain": (DAB, (), OBJECTS),
        "denoised": (DN, (), OBJECTS),
        "groups": ("group_dab_deformable.yaml", (), OBJECTS),
        "teacher": (DAB, ("MODEL.DN_DETR.TEACH.ENABLED", "True"), OBJECTS),
        "denoised, teacher": ("teach_dn_deformable.yaml", (), OBJECTS),
        "denoised, matchability": (DN, ("MODEL.DN_DETR.LOSS.KIND", "mal"), OBJECTS),
        "denoised, 4 x objects": (DN, (), 4 * OBJECTS),
    },
    "Faster R-CNN": {
        "plain": ("faster_rcnn_fpn.yaml", (), OBJECTS),
        "denoised": ("dn_faster_rcnn_fpn.yaml", (), OBJECTS),
    },
    "Mask2Former": {
        "plain": ("mask2former.yaml", (), OBJECTS),
        "denoised": ("dn_mask2former.yaml", (), OBJECTS),
    },
    "Mask DINO": {
        "plain": ("mask_dino_no_dn.yaml", (), OBJECTS),
        "boxes denoised": ("mask_dino_box_dn.yaml", (), OBJECTS),
        "denoised": ("mask_dino.yaml", (), OBJECTS),
    },
}
"""Detector -> who -> (configuration, overrides, objects in an image)."""


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--host", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), help="height and width")
    parser.add_argument(
        "--configs", type=Path, default=Path("configs"), help="folder of the configurations"
    )
    args = parser.parse_args()
    seconds = args.seconds if args.seconds is not None else (0.0 if args.quick else 5.0)
    size = (64, 96) if args.quick else tuple(args.size)
    folder = Path("configs/quick") if args.quick else args.configs
    make = partial(Case, batch=args.batch, size=size, device=args.device)
    rows = []
    for host in args.host:
        cases = [
            make(str(folder / config), opts=opts, objects=objects, name=who)
            for who, (config, opts, objects) in HOSTS[host].items()
        ]
        measured = measure(cases, seconds, with_memory=not args.quick)
        rows += [{**row, "host": host} for row in measured]
    keys = ("host", "batch", "size", "measure")
    print(table(rows, keys, against="plain"))
    save(args, "auxiliary_queries", rows, keys=keys, against="plain")


if __name__ == "__main__":
    main()
