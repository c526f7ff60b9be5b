"""Draw what a detector finds, where its layers look, and what it is trained on.

    dn-detr visualize detections --weights model.pth --data cells/ --output detections.png
    dn-detr visualize layers --weights model.pth --input street.jpg --output layers.png
    dn-detr visualize annotations dn_deformable --data cells/ --output look/
    dn-detr visualize batches dn_deformable --data cells/ --output look/
    dn-detr visualize denoising dino --iteration 500
    dn-detr visualize schedule deim_dino
    dn-detr visualize teacher teach_dn_deformable

detections: ground truth next to detections, for images of the test set. layers: boxes and
cross-attention of each decoder layer (a column) for the best detections (rows); white and dashed:
the reference of the layer; points: samples of deformable attention, coloured by level. The others
draw the training data of a configuration, with batches and noise as in a training with one process.
denoising: a panel per group; objects white, positives solid, negatives dashed. schedule: the share
of images that are mosaics or mixed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dn_detr.cli.common import add_config, at_least, pairs_of, picture, share

OF_DETECTOR = ("detections", "layers")
OF_DATA = ("annotations", "batches", "denoising", "schedule", "teacher")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("what", choices=[*OF_DETECTOR, *OF_DATA])
    add_config(parser, "of the training data; for checkpoints without configuration")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint, for detections and layers")
    parser.add_argument("--data", metavar="FOLDER", help="dataset: COCO, YOLO or Pascal VOC")
    parser.add_argument("--input", metavar="IMAGE", help="for layers")
    parser.add_argument(
        "--output", help="a picture for detections and layers, else a folder (default: visualized)"
    )
    parser.add_argument("--num-images", type=at_least(1), default=6)
    parser.add_argument("--num-objects", type=at_least(1), default=4, help="rows of layers")
    parser.add_argument("--iteration", type=at_least(0), default=0, help="of the training")
    parser.add_argument("--threshold", type=share, default=0.3, help="minimum score of detections")


def run(args: argparse.Namespace) -> None:
    """Draw."""
    from dn_detr.d2.config.defaults import read_config
    from dn_detr.errors import InputError

    args.opts = pairs_of(args, "data")
    if args.what in OF_DATA:
        from dn_detr.d2.inference.draw_data import draw_data

        if args.config is None:
            raise InputError(f"name a configuration: dn-detr visualize {args.what} CONFIG.")
        cfg, folder = read_config(args.config, args.opts), Path(args.output or "visualized")
        options = {"num_images": args.num_images, "iteration": args.iteration}
        for path in draw_data(args.what, cfg, folder, **options):
            print(path)
        return
    if args.weights is None:
        raise InputError(f"dn-detr visualize {args.what} needs --weights FILE.")
    output = picture(args.output or f"{args.what}.png")
    if args.what == "layers":
        _draw_layers(args, output)
    else:
        _draw_detections(args, output)
    print(f"wrote {output}")


def _draw_layers(args: argparse.Namespace, output: Path) -> None:
    from dn_detr.d2.inference.draw_layers import draw_layers
    from dn_detr.d2.inference.saved_detector import load_detector
    from dn_detr.errors import InputError

    if args.input is None:
        raise InputError("dn-detr visualize layers needs --input IMAGE.")
    saved = load_detector(args.weights, config_file=args.config, opts=args.opts)
    draw_layers(saved, args.input, output, num_objects=args.num_objects)


def _draw_detections(args: argparse.Namespace, output: Path) -> None:
    from dn_detr.cli.common import detector_of
    from dn_detr.d2.data.catalog import prepare
    from dn_detr.d2.inference.draw_test_set import draw_test_set

    detector = detector_of(args, args.threshold)
    cfg = detector.cfg.clone()
    cfg.defrost()
    cfg.MODEL.DN_DETR.CLASS_NAMES = detector.class_names
    prepare(cfg, eval_only=True)
    draw_test_set(cfg, detector, output, num_images=args.num_images)
