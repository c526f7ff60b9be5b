#!/usr/bin/env python
"""Draw ground truth next to detections, for some images of a test set.

python tools/draw_detections.py --output detections.png MODEL.WEIGHTS output/demo/model_final.pth
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from detectron2.config import CfgNode

from dn_detr import Detector
from dn_detr.d2.data import dataset_dicts
from dn_detr.d2.data.catalog import prepare
from dn_detr.d2.inference.saved_detector import read_saved_config, weights_named
from dn_detr.d2.inference.visualization import draw_found, draw_record
from dn_detr.detector import to_pixels
from dn_detr.errors import InputError


def draw(cfg: CfgNode, detector: Detector, *, num_images: int, output: Path) -> None:
    """Draw a row for each image: ground truth and detections."""
    loaded = dataset_dicts.load(cfg.DATASETS.TEST[0], check="off", with_masks=cfg.MODEL.MASK_ON)
    step = max(1, len(loaded.records) // num_images)
    chosen = [loaded.records[i] for i in range(0, len(loaded.records), step)][:num_images]
    columns = 2 if len(chosen) > 3 else 1
    rows = -(-len(chosen) // columns)
    images = [to_pixels(record["file_name"], "RGB") for record in chosen]
    tallest = max(image.shape[0] / image.shape[1] for image in images)
    size = (6 * columns, (3 * tallest + 0.3) * rows)  # inches; 0.3 for the titles
    figure, axes = plt.subplots(
        rows, 2 * columns, figsize=size, squeeze=False, constrained_layout=True
    )
    for axis in axes.flat:
        axis.axis("off")
    for index, (record, image) in enumerate(zip(chosen, images, strict=True)):
        found = detector(image, channel_order="RGB")
        row, column = divmod(index, columns)
        for offset, (picture, title) in enumerate(
            [
                (draw_record(image, record, loaded.class_names), "ground truth"),
                (draw_found(image, found), f"detections, score >= {detector.threshold:g}"),
            ]
        ):
            axis = axes[row, 2 * column + offset]
            axis.imshow(picture)
            axis.set_title(title, fontsize=9)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", help="for checkpoints without a configuration")
    parser.add_argument("--output", type=Path, default=Path("detections.png"))
    parser.add_argument("--num-images", type=int, default=6)
    parser.add_argument("--confidence-threshold", type=float, default=0.3)
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs, e.g. MODEL.WEIGHTS model.pth")
    args = parser.parse_args(arguments)
    output = args.output if args.output.suffix else args.output.with_suffix(".png")
    try:
        path = weights_named(args.config_file, args.opts)
        cfg, _ = read_saved_config(path, config_file=args.config_file, opts=args.opts)
        prepare(cfg, eval_only=True)
        detector = Detector.from_checkpoint(
            path,
            config_file=args.config_file,
            opts=args.opts,
            threshold=args.confidence_threshold,
        )
        draw(cfg, detector, num_images=args.num_images, output=output)
    except InputError as error:
        sys.exit(f"draw_detections.py: {error}")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
