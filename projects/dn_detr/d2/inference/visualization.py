"""Drawing of boxes and masks by Detectron2's visualizer, with one colour per class."""

from __future__ import annotations

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import VisImage, Visualizer

from dn_detr.d2.inference.plot_text import class_label, families

_SHORTEST_SIDE = 480  # pixels; smaller images are enlarged, so that captions do not cover them
_LONGEST_SIDE = 1600  # to which a long and narrow one is enlarged at most
_TEXT_SHARE = 1 / 45  # height of large captions in the root of the picture's area
_SMALLEST_TEXT = 14  # pixels; captions of small objects have half of it


class _Canvas(Visualizer):
    """Detectron2's visualizer with texts taken literally, in fonts that have their letters.

    Captions, and with them the widths of lines, grow with the picture.
    """

    def __init__(self, image: np.ndarray, *, scale: float = 1.0):
        super().__init__(image, scale=scale)
        height, width = image.shape[:2]
        self._default_font_size = max((height * width) ** 0.5 * _TEXT_SHARE, _SMALLEST_TEXT / scale)

    def draw_text(self, text: str, *args, **kwargs) -> VisImage:
        """See the base class, which takes `$` for formulas and always the same font."""
        output = super().draw_text("", *args, **kwargs)
        output.ax.texts[-1].set(parse_math=False, fontfamily=families([text]), text=text)
        return output


def class_color(label: int) -> tuple[float, float, float]:
    """Return the colour of a class, RGB in [0, 1]; the first 74 classes have different colours."""
    colors = colormap(rgb=True, maximum=1)
    red, green, blue = colors[label % len(colors)]
    return float(red), float(green), float(blue)


def _scale(image: np.ndarray) -> float:
    sides = image.shape[:2]
    return max(1.0, min(_SHORTEST_SIDE / min(sides), _LONGEST_SIDE / max(sides)))


def draw_boxes(
    image: np.ndarray,
    boxes_xyxy_px: np.ndarray,
    captions: list[str] | None,
    colors: list,
    *,
    masks: list | np.ndarray | None = None,
    enlarges: bool = True,
) -> np.ndarray:
    """Draw boxes and masks over an image.

    Args:
        image: uint8 RGB [height, width, 3].
        boxes_xyxy_px: [N, 4].
        captions: N texts; None draws none.
        colors: N colours of matplotlib.
        masks: N masks [height, width] or lists of polygons, as in Detectron2's visualizer.
        enlarges: Whether to enlarge small images.

    Returns:
        The picture, uint8 RGB [height, width, 3].
    """
    canvas = _Canvas(image, scale=_scale(image) if enlarges else 1.0)
    canvas.overlay_instances(
        boxes=np.asarray(boxes_xyxy_px, np.float64).reshape(-1, 4),
        masks=masks,
        labels=captions,
        assigned_colors=colors,
    )
    return canvas.output.get_image()


def draw_found(image: np.ndarray, found, *, enlarges: bool = True) -> np.ndarray:
    """Draw detections of a `Detector` over an image, uint8 RGB [height, width, 3]."""
    entries = zip(found.class_names, found.labels, found.scores, strict=True)
    captions = [f"{class_label(name, label)} {score:.0%}" for name, label, score in entries]
    colors = [class_color(label) for label in found.labels]
    return draw_boxes(
        image, found.boxes_xyxy_px, captions, colors, masks=found.masks, enlarges=enlarges
    )


def draw_record(image: np.ndarray, record: dict, class_names: list[str]) -> np.ndarray:
    """Draw the ground truth of a record over its image, uint8 RGB [height, width, 3].

    Captions mark crowd regions. Masks are drawn if every box has one.
    """
    annotations = record["annotations"]
    boxes = [
        BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations
    ]
    captions = [
        f"{class_label(class_names[label], label)}{' (crowd)' if a.get('iscrowd', 0) else ''}"
        for a in annotations
        for label in [a["category_id"]]
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
    """Draw boxes [N, 4], each with its own colour and line style ("-", "--"); see `draw_boxes`."""
    scale, (height, width) = _scale(image), image.shape[:2]
    canvas, size = _Canvas(image, scale=scale), 8 / scale  # in points of the picture
    # Matplotlib fails at points far outside; edges a little outside cannot be seen either.
    boxes = np.clip(boxes_xyxy_px, -9, [width + 9, height + 9] * 2)
    for box, caption, color, style in zip(boxes, captions, colors, line_styles, strict=True):
        canvas.draw_box(box, alpha=0.9, edge_color=color, line_style=style)
        canvas.draw_text(caption, box[:2], color=color, horizontal_alignment="left", font_size=size)
    return canvas.output.get_image()
