"""Postprocessing of predictions into detections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dn_detr.layers.box_ops import cxcywh_to_xyxy
from dn_detr.structures import Predictions


@dataclass(frozen=True, eq=False)
class Detections:
    """Detections of one image, best first.

    boxes_xyxy_px [k, 4] in pixels of the image; scores [k] in [0, 1]; labels [k] int64;
    masks [k, height, width] bool or None.
    """

    boxes_xyxy_px: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None


def postprocess(
    predictions: Predictions,
    image_sizes: list[tuple[int, int]],
    top_k: int,
    *,
    has_no_object: bool = False,
) -> list[Detections]:
    """Return the detections of each image, boxes in pixels; see `best_detections`.

    image_sizes: (height, width) of each unpadded image in pixels.
    """
    boxes, scores, labels = best_detections(predictions, top_k, has_no_object=has_no_object)
    detections = []
    for image, (height, width) in enumerate(image_sizes):
        x0, y0, x1, y1 = boxes[image].unbind(-1)
        pixels = torch.stack((x0 * width, y0 * height, x1 * width, y1 * height), dim=-1)
        detections.append(Detections(pixels, scores[image], labels[image]))
    return detections


def best_detections(
    predictions: Predictions, top_k: int, *, has_no_object: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the `top_k` best (query, class) pairs of the last layer, by sigmoid score.

    Args:
        top_k: k, detections per image.
        has_no_object: The last logit is "no object", scores are a softmax, and each query predicts
            only its best class (2005.12872).

    Returns:
        Boxes [B, k, 4] xyxy, clipped to [0, 1] of the unpadded image, scores [B, k] and labels
        [B, k] int64, best first.
    """
    last = predictions.of("match")
    if has_no_object:
        scores = last.logits[-1].softmax(-1)[..., :-1]
        scores = torch.where(scores == scores.amax(-1, keepdim=True), scores, 0)
    else:
        scores = last.logits[-1].sigmoid()
    num_queries, num_classes = scores.shape[1:]
    most = num_queries if has_no_object else num_queries * num_classes
    best, index = scores.flatten(1).topk(min(top_k, most), dim=1)
    query = (index // num_classes)[..., None].expand(-1, -1, 4)
    boxes = cxcywh_to_xyxy(last.boxes[-1]).clamp(0, 1).gather(1, query)
    return boxes, best, index % num_classes
