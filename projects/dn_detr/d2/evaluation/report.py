"""Report on an evaluation: a self-contained HTML page, json, and pictures of its curves."""

from __future__ import annotations

import base64
import io
import json
import math
import os

import numpy as np
from jinja2 import Environment
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from pycocotools.cocoeval import COCOeval

from dn_detr.d2.evaluation.error_analysis import IOU, Analysis, ImageResult, analyse
from dn_detr.d2.inference.plot_text import class_label, literal_text
from dn_detr.d2.inference.visualization import draw_styled
from dn_detr.datasets.image_files import read_rgb
from dn_detr.errors import BadImage, InputError

NUM_IMAGES = 12  # images with most errors in the report
_MOST_CURVES = 12  # most classes with their own curve
_MOST_NUMBERS = 25  # most classes for which the confusion matrix shows its counts

RIGHT, WRONG_CLASS, EXTRA, MISSED = "#2a9d3a", "#d9a400", "#e03131", "#1c6fe0"

_TEMPLATES = Environment(autoescape=True)
_TEMPLATES.filters["number"] = lambda x: "–" if math.isnan(x) else f"{x:.1f}"
_PAGE = _TEMPLATES.from_string(
    """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{{ name }}</title><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: right }
th { border-bottom: 1px solid #888 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) { background: #f4f4f4 } img { max-width: 100% } figure { margin: 1.5em 0 }
figcaption { color: #444 } .images { columns: 2 }
.images figure { break-inside: avoid; margin-top: 0 }
</style></head><body>
<h1>{{ name }}</h1>
<p>{{ num_images }} images, {{ num_objects }} objects.</p>
<h2>Average precision</h2>
<table><tr><th></th>{% for key in metrics %}<th>{{ key }}</th>{% endfor %}</tr>
{% for what, values in (("boxes", metrics), ("masks", mask_metrics)) if values %}<tr>
<td>{{ what }}</td>
{% for value in values.values() %}<td>{{ value|number }}</td>{% endfor %}</tr>{% endfor %}</table>
<p>COCO metrics in percent, over all scores; up to {{ limit }} detections per class and image count.
{% if mask_metrics %}Everything below is about boxes, except the AP of masks.{% endif %}</p>
<h2>Classes</h2>
<p>Threshold: the score with the best F1 at IoU {{ iou }}; precision, recall and F1 are those of
detections with at least this score.</p>
<table><tr><th>class</th><th>objects</th><th>AP</th><th>AP50</th><th>AP75</th>
{% if mask_metrics %}<th>mask AP</th>{% endif %}<th>threshold</th>
<th>precision</th><th>recall</th><th>F1</th></tr>
{% for row in classes %}<tr><td>{{ row.name }}</td><td>{{ row.num_objects }}</td>
<td>{{ row.AP|number }}</td><td>{{ row.AP50|number }}</td><td>{{ row.AP75|number }}</td>
{% if mask_metrics %}<td>{{ row.mask_AP|number }}</td>{% endif %}
{% if row.best %}<td>{{ "%.3f"|format(row.best.threshold) }}</td>
<td>{{ "%.1f"|format(100 * row.best.precision) }}</td>
<td>{{ "%.1f"|format(100 * row.best.recall) }}</td>
<td>{{ "%.1f"|format(100 * row.best.f1) }}</td>
{% else %}<td></td><td></td><td></td><td></td>{% endif %}
</tr>{% endfor %}</table>
<figure>
<img src="{{ curves_picture }}" alt="precision and recall, and F1 over the threshold"></figure>
<h2>Confusions</h2>
<p>At the threshold {{ "%.3f"|format(threshold) }} with the best F1 over all classes. Detections
are matched with objects of any class at IoU {{ iou }}.</p>
<figure><img src="{{ confusion_picture }}" alt="confusion matrix"></figure>
{% if images %}<h2>Images with most errors</h2>
<p>At the same threshold: <b style="color:{{ right }}">right</b>,
<b style="color:{{ wrong }}">wrong class</b>, <b style="color:{{ extra }}">no object</b>,
<b style="color:{{ missed }}">missed</b> (dashed).</p>
<div class="images">{% for image in images %}<figure><img src="{{ image.picture }}" alt="">
<figcaption>{{ image.file_name }}: {{ image.text }}</figcaption></figure>{% endfor %}</div>
{% endif %}</body></html>
"""
)


def write_report(
    folder: str,
    evaluated: COCOeval,
    results: list[dict],
    *,
    name: str,
    image_root: str | None,
    masks: COCOeval | None = None,
) -> str:
    """Write report.html, report.json, curves.png and confusion.png.

    Args:
        folder: Folder to write to.
        evaluated: Evaluation of boxes by `coco_evaluator.evaluate`.
        results: The evaluated results.
        name: Title of the report.
        image_root: Folder of the images; None shows no images.
        masks: Evaluation of masks, if any.

    Returns:
        The path of report.html, which embeds all pictures.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder of the report cannot be made: {error}.") from error
    analysis = analyse(evaluated, results, masks)
    content = to_json(analysis, name)
    with literal_text(result.name for result in analysis.classes):
        for key, plot in (("curves", plot_curves), ("confusion", plot_confusion)):
            FigureCanvasAgg(plot(analysis)).print_png(os.path.join(folder, f"{key}.png"))
    with open(os.path.join(folder, "report.json"), "w", encoding="utf-8") as file:
        json.dump(_without_nan(content), file, indent=1)
    worst = [image for image in analysis.images[:NUM_IMAGES] if image.num_errors]
    classes = [{"name": key, **values} for key, values in content.pop("classes").items()]
    html = _PAGE.render(
        **content,
        classes=classes,
        iou=IOU,
        limit=evaluated.params.maxDets[-1],
        num_objects=analysis.overall.num_objects,
        curves_picture=_embedded(os.path.join(folder, "curves.png")),
        confusion_picture=_embedded(os.path.join(folder, "confusion.png")),
        images=[] if image_root is None else _pictures(worst, image_root, evaluated.cocoGt.cats),
        right=RIGHT,
        wrong=WRONG_CLASS,
        extra=EXTRA,
        missed=MISSED,
    )
    path = os.path.join(folder, "report.html")
    with open(path, "w", encoding="utf-8") as file:
        file.write(html)
    return path


def to_json(analysis: Analysis, name: str) -> dict:
    """Return all numbers of the report; NaN for a class without objects."""
    classes = {}
    for result in analysis.classes:
        best = result.curve.best()
        classes[result.name] = {
            "num_objects": result.curve.num_objects,
            "AP": result.ap,
            "AP50": result.ap50,
            "AP75": result.ap75,
            **({} if result.mask_ap is None else {"mask_AP": result.mask_ap}),
            "best": None if best is None else vars(best),
        }
    return {
        "name": name,
        "num_images": len(analysis.images),
        "metrics": analysis.metrics,
        "mask_metrics": analysis.mask_metrics,
        "classes": classes,
        "threshold": analysis.threshold,
        "confusion": analysis.confusion.tolist(),
        "worst_images": [
            {
                "file_name": image.image["file_name"],
                "correct": len(image.correct),
                "confused": len(image.confused),
                "extra": len(image.extra),
                "missed": len(image.missed),
            }
            for image in analysis.images[:NUM_IMAGES]
        ],
    }


def drawn_names(analysis: Analysis) -> list[str]:
    """Return the names of all classes as they can be drawn."""
    return [class_label(result.name, i) for i, result in enumerate(analysis.classes)]


def plot_curves(analysis: Analysis) -> Figure:
    """Plot precision over recall and F1 over the threshold.

    There is one curve per class, for the classes with most objects, and one for all classes.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = zip(analysis.classes, drawn_names(analysis), strict=True)
    most = sorted(drawn, key=lambda pair: -pair[0].curve.num_objects)[:_MOST_CURVES]
    curves = [(name, r.curve, {"lw": 1}) for r, name in most if r.curve.num_objects]
    curves.append(("all classes", analysis.overall, {"lw": 2.5, "color": "black"}))
    for label, curve, style in curves:
        label = f" {label}" if label.startswith("_") else label  # else not in the legend
        left.plot(curve.recall, curve.precision, label=label, **style)
        right.plot(curve.thresholds, curve.f1, label=label, **style)
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    right.set(xlabel="threshold", ylabel="F1", xlim=(0, 1), ylim=(0, 1.02))
    right.axvline(analysis.threshold, color="grey", ls=":", lw=1)
    left.set_title(f"IoU {IOU}", fontsize=10)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    right.legend(fontsize=8, loc="upper right")
    return figure


def plot_confusion(analysis: Analysis) -> Figure:
    """Plot the confusion matrix, coloured by the fraction of each row."""
    names = [*drawn_names(analysis), "background"]
    matrix = analysis.confusion
    side = 1.5 + 0.55 * min(len(names), _MOST_NUMBERS)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 8 if len(names) <= _MOST_NUMBERS else 4
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axis.set_yticks(range(len(names)), names, fontsize=size)
    axis.set(xlabel="detected", ylabel="annotated")
    if len(names) <= _MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                axis.text(column, row, str(count), ha="center", va="center", color=color, size=8)
    return figure


def _pictures(images: list[ImageResult], image_root: str, categories: dict) -> list[dict]:
    """Draw the errors of images for the HTML page."""
    shown = []
    for image in images:
        try:
            pixels = read_rgb(os.path.join(image_root, image.image["file_name"]))
        except BadImage:  # the evaluation has named it
            continue
        entries = [
            *((result, RIGHT, "-") for result in image.correct),
            *((result, WRONG_CLASS, "-") for result in image.confused),
            *((result, EXTRA, "-") for result in image.extra),
            *((annotation, MISSED, "--") for annotation in image.missed),
        ]
        boxes = np.array([entry["bbox"] for entry, _, _ in entries], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        drawn = draw_styled(
            pixels,
            boxes,
            captions=[_caption(entry, categories) for entry, _, _ in entries],
            colors=[color for _, color, _ in entries],
            line_styles=[style for _, _, style in entries],
        )
        buffer = io.BytesIO()
        Image.fromarray(drawn).save(buffer, format="JPEG", quality=85)
        text = (
            f"{len(image.correct)} right, {len(image.confused)} with the wrong class, "
            f"{len(image.extra)} without an object, {len(image.missed)} missed"
        )
        picture = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        shown.append({"file_name": image.image["file_name"], "text": text, "picture": picture})
    return shown


def _caption(entry: dict, categories: dict) -> str:
    def name_of(category: int) -> str:
        return class_label(categories[category]["name"], sorted(categories).index(category))

    name = name_of(entry["category_id"])
    if "score" not in entry:
        return name
    true = entry.get("true_category_id", entry["category_id"])
    other = "" if true == entry["category_id"] else f", is {name_of(true)}"
    return f"{name} {entry['score']:.0%}{other}"


def _embedded(path: str) -> str:
    with open(path, "rb") as file:
        return f"data:image/png;base64,{base64.b64encode(file.read()).decode()}"


def _without_nan(value):
    """Replace NaN, which json does not have, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
