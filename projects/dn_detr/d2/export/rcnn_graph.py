"""Inference of Faster R-CNN as a function of tensors; see `graphs` for inputs and outputs.

It runs Detectron2's modules in Detectron2's order. Lists of images with different numbers of boxes
become tensors with one number of boxes, so that the batch size can vary; missing detections have
score 0, label 0 and a box of zeros.
"""

from __future__ import annotations

import torch
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor, nn
from torchvision.ops import nms

from dn_detr.d2.modeling.faster_rcnn import DenoisingRCNN
from dn_detr.d2.modeling.images import prepare
from dn_detr.errors import InputError


class RCNNGraph(nn.Module):
    """Inference of a Faster R-CNN; InputError if it has masks or keypoints."""

    def __init__(self, model: DenoisingRCNN):
        super().__init__()
        if model.roi_heads.mask_on or model.roi_heads.keypoint_on:
            raise InputError("a Faster R-CNN with masks or keypoints cannot be exported.")
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map images [B, 3, H, W] and sizes [B, 2] to boxes [B, k, 4], scores and labels [B, k]."""
        normalised, _ = prepare(self.model, images, sizes)
        features = self.model.backbone(normalised)
        corners = sizes.flip(1).repeat(1, 2).to(normalised.dtype)[:, None]  # [B, 1, 4]
        canvas = tuple(images.shape[-2:])
        regions, is_region = self.propose(features, corners, canvas)
        boxes, scores = self.classify(features, regions)
        is_valid = is_region & boxes.isfinite().all((-2, -1)) & scores.isfinite().all(-1)
        boxes = torch.minimum(boxes.clamp(min=0), corners[:, :, None])
        scores = torch.where(is_valid[..., None], scores, -1)
        boxes, scores, labels = self.best(boxes, scores, canvas)
        return boxes / corners, scores, labels

    def propose(
        self, features: dict[str, Tensor], corners: Tensor, canvas: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Propose R regions per image.

        Args:
            features: Name -> [B, C, h, w].
            corners: [B, 1, 4], (width, height, width, height) of each image in pixels.
            canvas: (height, width) in pixels.

        Returns:
            Regions [B, R, 4] xyxy in pixels, and [B, R] bool, False for padding.
        """
        generator = self.model.proposal_generator
        before, after = generator.pre_nms_topk[False], generator.post_nms_topk[False]
        maps = [features[name] for name in generator.in_features]
        all_boxes, all_logits = [], []
        for anchors, logits, deltas in zip(
            anchors_of(generator.anchor_generator, maps), *generator.rpn_head(maps), strict=True
        ):
            logits = logits.permute(0, 2, 3, 1).flatten(1)
            missing = logits.new_full((1, before), -torch.inf).expand(logits.shape[0], -1)
            # a small canvas has fewer anchors than `before`
            logits, index = torch.cat((logits, missing), dim=1).topk(before, dim=1)
            index = torch.where(logits.isfinite(), index, 0)[..., None].expand(-1, -1, 4)
            deltas = deltas.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            anchors = anchors.expand(logits.shape[0], -1, -1).gather(1, index)
            boxes = moved(generator.box2box_transform, anchors, deltas.gather(1, index))
            is_finite = logits.isfinite() & boxes.isfinite().all(-1)
            boxes = torch.minimum(boxes.clamp(min=0), corners)
            is_large = (boxes[..., 2:] - boxes[..., :2] > generator.min_box_size).all(-1)
            logits = torch.where(is_finite & is_large, logits, -torch.inf)
            image = torch.arange(logits.shape[0], device=logits.device)[:, None].expand_as(logits)
            is_kept = keep(
                boxes.flatten(0, 1),
                logits.flatten(),
                image.flatten(),
                torch.zeros_like(image).flatten(),
                canvas=canvas,
                threshold=generator.nms_thresh,
            )
            all_boxes.append(boxes)
            all_logits.append(torch.where(is_kept.view_as(logits), logits, -torch.inf))
        logits = torch.cat(all_logits, dim=1)
        logits, index = logits.topk(min(after, before * len(maps)), dim=1)
        regions = torch.cat(all_boxes, dim=1).gather(1, index[..., None].expand(-1, -1, 4))
        return regions, logits.isfinite()

    def classify(self, features: dict[str, Tensor], regions: Tensor) -> tuple[Tensor, Tensor]:
        """Predict boxes [B, R, K, 4] in pixels and scores [B, R, K] of regions [B, R, 4]."""
        heads, predictor = self.model.roi_heads, self.model.roi_heads.box_predictor
        batch, count = regions.shape[:2]
        pooled = pool(heads.box_pooler, [features[name] for name in heads.box_in_features], regions)
        logits, deltas = predictor(heads.box_head(pooled))
        scores = logits.sigmoid() if predictor.use_sigmoid_ce else logits.softmax(-1)
        scores = scores[:, :-1].unflatten(0, (batch, count))
        deltas = deltas.unflatten(0, (batch, count))
        boxes = moved(predictor.box2box_transform, regions, deltas)
        boxes = boxes.unflatten(2, (-1, 4))  # one for all classes, or one for each
        return boxes.expand(-1, -1, scores.shape[2], -1), scores

    def best(
        self, boxes: Tensor, scores: Tensor, canvas: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Select the best detections after non-maximum suppression by class.

        Args:
            boxes: [B, R, K, 4] xyxy in pixels.
            scores: [B, R, K].
            canvas: (height, width) in pixels.

        Returns:
            Boxes [B, k, 4], scores [B, k] and labels [B, k] int64, best first.
        """
        predictor = self.model.roi_heads.box_predictor
        num_regions, num_classes = scores.shape[1:]
        flat = scores.flatten()
        index = (flat > predictor.test_score_thresh).nonzero()[:, 0]
        is_kept = keep(
            boxes.flatten(0, 2)[index],
            flat[index],
            index // (num_regions * num_classes),
            index % num_classes,
            canvas=canvas,
            threshold=predictor.test_nms_thresh,
        )
        found = torch.where(is_kept, flat[index], 0)
        scores = torch.zeros_like(flat).index_put((index,), found).view_as(scores).flatten(1)
        top_k = min(predictor.test_topk_per_image, num_regions * num_classes)
        scores, order = scores.topk(top_k, dim=1)
        boxes = boxes.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, 4))
        is_valid = scores > 0
        boxes = torch.where(is_valid[..., None], boxes, 0)
        return boxes, scores, torch.where(is_valid, order % num_classes, 0)


def anchors_of(generator: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    """Return the anchors [h * w * A, 4] xyxy in pixels of each map [B, C, h, w]."""
    found = []
    for level, stride, cell in zip(maps, generator.strides, generator.cell_anchors, strict=True):
        y, x = (
            (torch.arange(side, device=cell.device) + generator.offset) * stride
            for side in level.shape[-2:]
        )
        y, x = torch.meshgrid(y, x, indexing="ij")
        centers = torch.stack((x, y, x, y), dim=-1)
        found.append((centers[:, :, None] + cell).flatten(0, 2))
    return found


def moved(transform, boxes: Tensor, deltas: Tensor) -> Tensor:
    """Apply deltas [B, N, 4 or 4 * K] to boxes [B, N, 4] xyxy; the result is shaped like deltas."""
    return transform.apply_deltas(deltas.flatten(0, 1), boxes.flatten(0, 1)).view_as(deltas)


def pool(pooler: nn.Module, maps: list[Tensor], regions: Tensor) -> Tensor:
    """Pool maps [B, C, h, w] in regions [B, R, 4] to [B * R, C, height, width]."""
    image = torch.arange(regions.shape[0], device=regions.device, dtype=regions.dtype)
    image = image[:, None, None].expand(-1, regions.shape[1], -1)
    regions = torch.cat((image, regions), dim=-1).flatten(0, 1)
    if len(maps) == 1:
        return pooler.level_poolers[0](maps[0], regions)
    levels = assign_boxes_to_levels(
        [Boxes(regions[:, 1:])],
        pooler.min_level,
        pooler.max_level,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )
    pooled = maps[0].new_zeros(regions.shape[0], maps[0].shape[1], *pooler.output_size)
    for level, level_pooler in enumerate(pooler.level_poolers):
        index = (levels == level).nonzero()[:, 0]
        pooled = pooled.index_put((index,), level_pooler(maps[level], regions[index]))
    return pooled


def keep(
    boxes: Tensor,
    scores: Tensor,
    image: Tensor,
    label: Tensor,
    *,
    canvas: tuple[int, int],
    threshold: float,
) -> Tensor:
    """Apply non-maximum suppression within each image and label.

    Args:
        boxes: [N, 4] xyxy on the canvas, in pixels.
        scores: [N].
        image: [N] int64, index of the image.
        label: [N] int64.
        canvas: (height, width) in pixels.
        threshold: Largest IoU with a better box.

    Returns:
        [N] bool, True for boxes to keep.
    """
    height, width = canvas
    # Shift labels to the right and images down, so that boxes of different ones do not overlap.
    shift = torch.stack((label * (width + 1), image * (height + 1)), dim=1).to(boxes.dtype)
    kept = nms(boxes + shift.repeat(1, 2), scores, threshold)
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, kept, True)
