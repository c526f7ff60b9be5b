"""Draw boxes and cross-attention of each decoder layer for one image.

A row for each detection, a column for each decoder layer. White and dashed: the reference of the
layer (a box or a point; DETR and Mask2Former have none). In the colour of the class: the predicted
box. Deformable attention: the sampling points of all heads, darker with more weight, coloured by
level. Dense attention: the attention map, averaged over heads and levels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dn_detr.d2.data.mapper import ResizeShortestEdge
from dn_detr.d2.inference.attention_recorder import LayerAttention, record_attention
from dn_detr.d2.inference.plot_text import class_label, families
from dn_detr.d2.inference.saved_detector import SavedDetector
from dn_detr.d2.inference.visualization import class_color
from dn_detr.d2.modeling.meta_arch import core_of
from dn_detr.datasets.image_files import read_rgb
from dn_detr.errors import InputError
from dn_detr.layers.box_ops import cxcywh_to_xyxy
from dn_detr.structures import Predictions

LEVEL_COLORS = ("#ff4b3e", "#ffb000", "#19c37d", "#2f8fff", "#c05cff")


def look(saved: SavedDetector, image: np.ndarray) -> tuple[Predictions, list[LayerAttention]]:
    """Return predictions of the matched queries, and the attention of every decoder layer.

    The image has the channel order of the model.
    """
    model, inputs = saved.model, saved.cfg.INPUT
    resize = ResizeShortestEdge(inputs.MIN_SIZE_TEST, inputs.MAX_SIZE_TEST).get_transform(image)
    pixels = torch.from_numpy(np.ascontiguousarray(resize.apply_image(image).transpose(2, 0, 1)))
    with torch.inference_mode(), record_attention(core_of(model, "visualize layers")) as looks:
        predictions = model.predict(model.make_batch([{"image": pixels}]))
    if not any(entry.samples or entry.maps for entry in looks):
        raise InputError("this model has no cross-attention that can be drawn.")
    return predictions.of("match"), looks


def best_queries(saved: SavedDetector, predictions: Predictions, count: int) -> list[tuple]:
    """Return (query, class, score) of the best detections, each query at most once."""
    logits = predictions.logits[-1]
    scores = logits.softmax(-1)[0, :, :-1] if saved.model.has_no_object else logits.sigmoid()[0]
    best, labels = scores.max(-1)
    order = best.argsort(descending=True)[:count].tolist()
    return [(query, int(labels[query]), float(best[query])) for query in order]


def draw(
    saved: SavedDetector,
    image: np.ndarray,
    predictions: Predictions,
    looks: list[LayerAttention],
    *,
    num_objects: int,
) -> Figure:
    """Draw the figure; image: RGB."""
    height, width = image.shape[:2]
    queries = best_queries(saved, predictions, num_objects)
    first = len(predictions.references) - len(looks)  # some methods predict before the first layer
    size = 3.2
    figure = Figure(
        figsize=(size * len(looks), (size * height / width + 0.3) * len(queries)),
        layout="constrained",
        dpi=100,
    )
    axes = figure.subplots(len(queries), len(looks), squeeze=False)
    for row, (query, label, score) in zip(axes, queries, strict=True):
        for layer, (axis, entry) in enumerate(zip(row, looks, strict=True)):
            axis.imshow(image)
            draw_look(axis, entry, query, width, height)
            reference = predictions.references[first + layer]
            if reference is not None:
                draw_reference(axis, reference[0, query].float().cpu(), width, height)
            if predictions.boxes is not None:
                box = predictions.boxes[first + layer, 0, query].float().cpu()
                draw_box(axis, box, width, height, edgecolor=class_color(label), lw=2)
            axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
            axis.set_title(f"layer {layer + 1}", fontsize=8)
        name = f"{class_label(saved.class_names[label], label)} {score:.0%}"
        row[0].set_ylabel(name, fontsize=9, parse_math=False, fontfamily=families([name]))
    return figure


def draw_look(axis: Axes, entry: LayerAttention, query: int, width: int, height: int) -> None:
    """Draw sampling points, or attention as a heat map."""
    for samples in entry.samples:
        points = samples.locations[0, query].float().cpu()  # [H, levels, P, 2]
        weights = samples.weights[0, query].float().cpu()
        for level in range(points.shape[1]):
            x, y = (points[:, level] * torch.tensor([width, height])).flatten(0, 1).unbind(-1)
            share = (weights[:, level] / weights.max()).flatten().numpy()
            color = LEVEL_COLORS[level % len(LEVEL_COLORS)]
            axis.scatter(x, y, s=5 + 20 * share, c=color, alpha=0.2 + 0.8 * share, linewidths=0)
    for attention in entry.maps:
        heat = attention.weights[0, query].float().cpu().numpy()
        valid_width, valid_height = attention.valid_sizes[0].tolist()
        right, bottom = heat.shape[1] / valid_width * width, heat.shape[0] / valid_height * height
        axis.imshow(
            heat / heat.max(),
            extent=(0, right, bottom, 0),
            cmap="inferno",
            alpha=0.65 / len(entry.maps) ** 0.5,
            interpolation="bilinear",
        )


def draw_reference(axis: Axes, reference: torch.Tensor, width: int, height: int) -> None:
    """Draw a reference: cxcywh [4] or a point [2], in [0, 1]."""
    if reference.shape[0] == 4:
        draw_box(axis, reference, width, height, edgecolor="white", lw=1.2, ls="--")
    else:
        axis.plot(reference[0] * width, reference[1] * height, "w+", ms=9, mew=1.8)


def draw_box(axis: Axes, box: torch.Tensor, width: int, height: int, **style) -> None:
    """Draw a box [4], cxcywh in [0, 1]."""
    x0, y0, x1, y1 = (cxcywh_to_xyxy(box) * torch.tensor([width, height] * 2)).tolist()
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))


def draw_layers(saved: SavedDetector, image: str, output: Path, *, num_objects: int = 4) -> None:
    """Write the figure for an image file, with a row for each of the best detections."""
    pixels = read_rgb(image)
    channels = pixels if saved.cfg.INPUT.FORMAT == "RGB" else pixels[:, :, ::-1]
    figure = draw(saved, pixels, *look(saved, channels), num_objects=num_objects)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
