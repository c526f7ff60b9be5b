"""Draw ground truth next to detections, for some images of a test set."""

from __future__ import annotations

from pathlib import Path

from detectron2.config import CfgNode
from matplotlib.figure import Figure

from dn_detr.d2.data import dataset_dicts
from dn_detr.d2.inference.visualization import draw_found, draw_record
from dn_detr.datasets.image_files import read_rgb


def draw_test_set(cfg: CfgNode, detector, output: Path, *, num_images: int = 6) -> None:
    """Write a picture with ground truth and detections side by side.

    Args:
        cfg: Its first test dataset, which must be registered, gives the images, evenly spaced.
        detector: A `Detector`.
        output: The picture.
        num_images: Most images.
    """
    loaded = dataset_dicts.load(cfg.DATASETS.TEST[0], check="off", with_masks=cfg.MODEL.MASK_ON)
    step = max(1, len(loaded.records) // num_images)
    chosen = [loaded.records[i] for i in range(0, len(loaded.records), step)][:num_images]
    columns = 2 if len(chosen) > 3 else 1
    rows = -(-len(chosen) // columns)
    images = [read_rgb(record["file_name"]) for record in chosen]
    tallest = max(image.shape[0] / image.shape[1] for image in images)
    size = (6 * columns, (3 * tallest + 0.3) * rows)  # inches; 0.3 for the titles
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, 2 * columns, squeeze=False)
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
