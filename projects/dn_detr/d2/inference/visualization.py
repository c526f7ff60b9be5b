"""Boxes and masks with names over images, by Detectron2's visualizer, in colours that follow the class."""

from __future__ import annotations

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer

_SHORTEST_SIDE = 480  # pixels; smaller images are drawn enlarged, or names would hide them


def class_color(label: int) -> tuple[float, float, float]:
    """The colour of a class, RGB in [0, 1]: always the same, and different among the first 74."""
    colors = colormap(rgb=True, maximum=1)
    red, green, blue = colors[label % len(colors)]
    return float(red), float(green), float(blue)


def _scale(image: np.ndarray) -> float:
    return max(1.0, _SHORTEST_SIDE / min(image.shape[:2]))


def draw_boxes(
    image: np.ndarray,
    boxes_xyxy_px: np.ndarray,
    captions: list[str] | None,
    colors: list,
    *,
    masks: list | np.ndarray | None = None,
    enlarges: bool = True,
) -> np.ndarray:
    """Boxes [N, 4] with N captions and N colours over an image, both uint8 RGB [height, width, 3].

    masks: N masks [height, width] or lists of polygons, as Detectron2's visualizer takes them.
    Captions None: no text. Small images come back enlarged if `enlarges`, others in their own size.
    """
    canvas = Visualizer(image, scale=_scale(image) if enlarges else 1.0)
    canvas.overlay_instances(
        boxes=np.asarray(boxes_xyxy_px, np.float64).reshape(-1, 4),
        masks=masks,
        labels=captions,
        assigned_colors=colors,
    )
    return canvas.output.get_image()


def draw_found(image: np.ndarray, found, *, enlarges: bool = True) -> np.ndarray:
    """What a `Detector` has found in an image: boxes, and masks if any, with class and score."""
    captions = [
        f"{name} {score:.0%}" for name, score in zip(found.class_names, found.scores, strict=True)
    ]
    colors = [class_color(label) for label in found.labels]
    return draw_boxes(
        image, found.boxes_xyxy_px, captions, colors, masks=found.masks, enlarges=enlarges
    )


def draw_record(image: np.ndarray, record: dict, class_names: list[str]) -> np.ndarray:
    """The ground truth of a record of `records.load`: boxes with class names, crowd regions named
    as such, and masks where every box has one."""
    annotations = record["annotations"]
    boxes = [
        BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations
    ]
    captions = [
        f"{class_names[a['category_id']]}{' (crowd)' if a.get('iscrowd', 0) else ''}"
        for a in annotations
    ]
    colors = [class_color(a["category_id"]) for a in annotations]
    has_masks = bool(annotations) and all("segmentation" in a for a in annotations)
    masks = [a["segmentation"] for a in annotations] if has_masks else None
    return draw_boxes(image, boxes, captions, colors, masks=masks)


def draw_styled(
    image: np.ndarray,
    boxes_xyxy_px: np.ndarray,
    *,
    captions: list[str],
    colors: list,
    line_styles: list[str],
) -> np.ndarray:
    """Boxes over an image, each in its own colour and line style ("-", "--")."""
    scale = _scale(image)
    canvas, size = Visualizer(image, scale=scale), 8 / scale  # points, whatever the image
    for box, caption, color, style in zip(
        boxes_xyxy_px, captions, colors, line_styles, strict=True
    ):
        canvas.draw_box(box, alpha=0.9, edge_color=color, line_style=style)
        canvas.draw_text(caption, box[:2], color=color, horizontal_alignment="left", font_size=size)
    return canvas.output.get_image()
