#!/usr/bin/env python
"""Draw ground truth beside the detections of a trained model, for some images of its test set.

    python tools/draw_detections.py --config-file output/demo/config.yaml --output detections.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.engine import DefaultPredictor
from detectron2.utils.visualizer import ColorMode, Visualizer

from dn_detr.d2.config import read_config
from dn_detr.d2.datasets import prepare


def draw(cfg: CfgNode, *, num_images: int, threshold: float, output: Path) -> None:
    """A row for each image: what is there, and what was found with at least `threshold`."""
    name = cfg.DATASETS.TEST[0]
    predictor, metadata = DefaultPredictor(cfg), MetadataCatalog.get(name)
    samples = DatasetCatalog.get(name)
    samples = samples[:: max(1, len(samples) // num_images)][:num_images]
    columns = 2 if num_images > 3 else 1
    rows = -(-num_images // columns)
    figure, axes = plt.subplots(
        rows, 2 * columns, figsize=(6 * columns, 3 * rows), squeeze=False, constrained_layout=True
    )
    for axis in axes.flat:
        axis.axis("off")
    for index, sample in enumerate(samples):
        image = detection_utils.read_image(sample["file_name"], "BGR")
        found = predictor(image)["instances"].to("cpu")
        found = found[found.scores >= threshold]

        def canvas():
            scale = max(1.0, 480 / max(image.shape[:2]))
            return Visualizer(image[:, :, ::-1], metadata, scale, ColorMode.IMAGE)

        truth = [{k: v for k, v in a.items() if k != "segmentation"} for a in sample["annotations"]]
        drawn = canvas().draw_dataset_dict({**sample, "annotations": truth}).get_image()
        guess = canvas().draw_instance_predictions(found).get_image()
        row, column = divmod(index, columns)
        for offset, (picture, title) in enumerate(
            [(drawn, "ground truth"), (guess, f"detections, score >= {threshold:g}")]
        ):
            axis = axes[row, 2 * column + offset]
            axis.imshow(picture)
            axis.set_title(title, fontsize=9)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True, help="config.yaml of the trained run")
    parser.add_argument("--output", type=Path, default=Path("detections.png"))
    parser.add_argument("--num-images", type=int, default=6)
    parser.add_argument("--confidence-threshold", type=float, default=0.3)
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs, e.g. MODEL.WEIGHTS model.pth")
    args = parser.parse_args()
    cfg = read_config(args.config_file, args.opts)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    prepare(cfg, eval_only=True)
    draw(
        cfg,
        num_images=args.num_images,
        threshold=args.confidence_threshold,
        output=args.output,
    )
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
