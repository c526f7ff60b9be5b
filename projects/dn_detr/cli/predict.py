"""Detect objects in images, videos or a webcam.

    dn-detr predict pictures/ drive.mp4 --weights model.pth --output found
    dn-detr predict "a/**/*.png" --weights model.pth --output found --save json csv yolo
    dn-detr predict street.jpg --weights model.pth --threshold 0.3 person=0.5 --classes person car
    dn-detr predict webcam --weights model.pth --output found.mp4

Inputs are files, folders with all below them, patterns, and .txt files that list these. Outputs
keep names and sub-folders, never replace an input, and never each other. Inputs that cannot be used
are named at the end, with exit status 1. --save writes COCO results (predictions.json, category_id
is the class number from 1), a table (predictions.csv), and YOLO's text files (labels/) as well.
Needs no display; a class always has the same colour. A webcam (webcam:1 is the second one) is
recorded until Ctrl-C.
"""

from __future__ import annotations

import argparse

from dn_detr.cli.common import add_detector, at_least, detector_of, share


def threshold(text: str) -> tuple[str, float]:
    """Read 0.3 or class=0.5, a type of argparse; the name of the first is ""."""
    name, _, value = text.rpartition("=")
    return name, share(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="see above")
    add_detector(parser)
    parser.add_argument("--output", default="found", help="a folder, or one file (default: found)")
    parser.add_argument(
        "--threshold",
        nargs="+",
        type=threshold,
        default=[("", 0.3)],
        metavar="SCORE",
        help="minimum score, and CLASS=SCORE for single classes (default: 0.3)",
    )
    parser.add_argument("--classes", nargs="+", default=[], metavar="CLASS", help="only these")
    parser.add_argument("--top", type=at_least(0), default=0, help="most objects in an image")
    parser.add_argument("--save", nargs="+", choices=["json", "csv", "yolo"], default=[])
    parser.add_argument("--no-pictures", action="store_true", help="draw nothing")
    parser.add_argument("--batch", type=at_least(1), default=8, help="images at a time")


def run(args: argparse.Namespace) -> list[str]:
    """Detect; return a sentence for each input that could not be used."""
    from dn_detr.d2.inference.predict import Selection, predict

    scores = dict(args.threshold)
    selection = Selection(scores.pop("", 0.3), scores, args.classes, args.top)
    return predict(
        detector_of(args),
        args.inputs,
        args.output,
        selection=selection,
        save=args.save,
        draws=not args.no_pictures,
        batch_size=args.batch,
    )
