"""Removal of unusable boxes from a COCO annotation file."""

from __future__ import annotations

from dataclasses import dataclass

from dn_detr.d2.data.coco_check import check_annotations
from dn_detr.d2.data.dataset_dicts import fit_box


@dataclass(frozen=True)
class Cleaning:
    """Content of a cleaned COCO file.

    Args:
        content: Parsed json.
        num_dropped: Boxes without size or outside their image.
        num_clipped: Boxes clipped at the border of their image.
    """

    content: dict
    num_dropped: int
    num_clipped: int


def clean_content(json_file: str, content: dict) -> Cleaning:
    """Drop and clip the boxes of a COCO json file as training does; keep everything else.

    Crowd regions and images without boxes stay. A clipped box without segmentation gets a new area.

    Raises:
        InputError: If the content is not in COCO format; it names `json_file`.
    """
    check_annotations(json_file, content)
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    kept, num_dropped, num_clipped = [], 0, 0
    for annotation in content.get("annotations", ()):
        if annotation.get("iscrowd", 0):
            kept.append(annotation)
            continue
        x, y, w, h = annotation["bbox"]
        corners = [x, y, x + w, y + h]
        box, _ = fit_box(corners, *sizes[annotation["image_id"]])
        if box is None:
            num_dropped += 1
            continue
        if box != corners:
            num_clipped += 1
            annotation = {**annotation, "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
            if not annotation.get("segmentation"):
                annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        kept.append(annotation)
    return Cleaning({**content, "annotations": kept}, num_dropped, num_clipped)
