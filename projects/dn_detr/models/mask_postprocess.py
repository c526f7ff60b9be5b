"""Postprocessing of predictions with masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dn_detr.layers.box_ops import cxcywh_to_xyxy
from dn_detr.models.mask_head import mask_logits
from dn_detr.models.postprocess import Detections
from dn_detr.structures import Predictions

AT_ONCE = 25
"""Masks upsampled at once: 100 masks of 1333 x 800 in float32 would take 430 MB."""


def postprocess_masks(
    predictions: Predictions,
    image_sizes: list[tuple[int, int]],
    *,
    canvas: tuple[int, int],
    output_sizes: list[tuple[int, int]],
    top_k: int,
    has_no_object: bool,
) -> list[Detections]:
    """Select the `top_k` best (query, class) pairs of the last layer, with masks.

    Pairs are selected by class score; the final score is the class score times the mean probability
    inside the mask (2112.01527, code). Without predicted boxes, the boxes enclose the masks (0 for
    empty masks).

    Args:
        image_sizes: (height, width) of each unpadded image in pixels.
        canvas: (height, width) of the padded batch in pixels.
        output_sizes: (height, width) of each result in pixels.
        has_no_object: The last logit is "no object" and scores are a softmax.
    """
    last = predictions.of("match")
    best, query, labels = best_pairs(last.logits[-1], top_k, has_no_object=has_no_object)
    embeddings, detections = last.mask_embeddings[-1], []
    for image, (size, output_size) in enumerate(zip(image_sizes, output_sizes, strict=True)):
        features = last.mask_features.features[image]
        chunks = [
            _upsample_masks(chunk, features, canvas, size, output_size)
            for chunk in embeddings[image, query[image]].split(AT_ONCE)
        ]
        masks, mask_scores = (torch.cat(values) for values in zip(*chunks, strict=True))
        if last.boxes is None:
            boxes = boxes_around(masks)
        else:
            height, width = output_size
            x0, y0, x1, y1 = (
                cxcywh_to_xyxy(last.boxes[-1, image, query[image]]).clamp(0, 1).unbind(-1)
            )
            boxes = torch.stack((x0 * width, y0 * height, x1 * width, y1 * height), dim=-1)
        score, order = (best[image] * mask_scores).sort(descending=True)
        detections.append(Detections(boxes[order], score, labels[image, order], masks[order]))
    return detections


def _upsample_masks(
    embeddings: Tensor,
    features: Tensor,
    canvas: tuple[int, int],
    size: tuple[int, int],
    output_size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Return masks [k, H, W] bool in output size and their mean probabilities [k] of an image."""
    logits = torch.einsum("kc,chw->khw", embeddings, features.to(embeddings.dtype))
    logits = F.interpolate(logits[None], canvas, mode="bilinear")[..., : size[0], : size[1]]
    if size != output_size:
        logits = F.interpolate(logits, output_size, mode="bilinear")
    masks = logits[0] > 0
    return masks, mean_inside(logits[0], masks)


def best_masks(
    predictions: Predictions,
    sizes: Tensor,
    padding: Tensor,
    *,
    top_k: int,
    has_no_object: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Like `postprocess_masks` in image size, but batched and with unscaled mask logits.

    Args:
        sizes: [B, 2] int64, (height, width) of each unpadded image in pixels.
        padding: [B, H, W] bool of the padded batch.

    Returns:
        Boxes [B, k, 4] xyxy in [0, 1] of the unpadded image, scores [B, k], labels [B, k] int64,
        and mask logits [B, k, h, w] in the size of the padded mask features, best first.
    """
    last = predictions.of("match")
    best, query, labels = best_pairs(last.logits[-1], top_k, has_no_object=has_no_object)
    embeddings = last.mask_embeddings[-1]
    embeddings = embeddings.gather(1, query[..., None].expand(-1, -1, embeddings.shape[-1]))
    logits = mask_logits(embeddings, last.mask_features.features)
    chunks = []
    for chunk in logits.split(AT_ONCE, dim=1):
        upsampled = F.interpolate(chunk, padding.shape[1:], mode="bilinear")
        masks = (upsampled > 0) & ~padding[:, None]
        chunks.append((mean_inside(upsampled, masks), boxes_around(masks)))
    mask_scores, boxes = (torch.cat(values, dim=1) for values in zip(*chunks, strict=True))
    if last.boxes is None:
        x0, y0, x1, y1 = boxes.unbind(-1)
        height, width = sizes.to(boxes.dtype)[:, :, None].unbind(1)  # [B, 1] each
        boxes = torch.stack((x0 / width, y0 / height, x1 / width, y1 / height), dim=-1)
    else:
        boxes = cxcywh_to_xyxy(last.boxes[-1]).clamp(0, 1)
        boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
    scores, order = (best * mask_scores).topk(best.shape[1], dim=1)
    return (
        boxes.gather(1, order[..., None].expand(-1, -1, 4)),
        scores,
        labels.gather(1, order),
        logits.gather(1, order[..., None, None].expand(-1, -1, *logits.shape[2:])),
    )


def best_pairs(logits: Tensor, top_k: int, *, has_no_object: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, query indices and labels [B, k] of the best pairs; logits [B, Q, K]."""
    scores = logits.softmax(-1)[..., :-1] if has_no_object else logits.sigmoid()
    num_queries, num_classes = scores.shape[1:]
    best, index = scores.flatten(1).topk(min(top_k, num_queries * num_classes), dim=1)
    return best, index // num_classes, index % num_classes


def mean_inside(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the mean probability [...] inside masks; logits and masks (bool) are [..., h, w]."""
    probability = torch.where(masks, logits.sigmoid(), 0).sum((-2, -1))
    return probability / masks.sum((-2, -1)).clamp(min=1)


def boxes_around(masks: Tensor) -> Tensor:
    """Return boxes [..., 4] xyxy in pixels around masks [..., h, w] bool; 0 for empty masks."""
    sides = []
    for axis in (-2, -1):  # of columns, then of rows
        is_covered = masks.any(axis)
        pixels = torch.arange(is_covered.shape[-1], device=masks.device, dtype=torch.float32)
        first = torch.where(is_covered, pixels, torch.inf).amin(-1)
        sides.append((first, torch.where(is_covered, pixels + 1, 0).amax(-1)))
    (x0, x1), (y0, y1) = sides
    boxes = torch.stack((x0, y0, x1, y1), dim=-1)
    return torch.where(boxes.isfinite().all(-1, keepdim=True), boxes, 0)
