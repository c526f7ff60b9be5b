"""Masks are products of a query's embedding and a fine map of the image (2112.01527, sec. 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dn_detr.layers.box_ops import at_least_float32, xyxy_to_cxcywh
from dn_detr.layers.mlp import MLP
from dn_detr.models.neck import norm, resize_padding
from dn_detr.models.prediction_heads import class_head
from dn_detr.structures import MaskFeatures, Memory


class MaskHead(nn.Module):
    """the mask features: the finest level of the encoder, made as fine as a feature of the backbone by
    bilinear interpolation, plus that feature, as in a feature pyramid (2112.01527, code).

    in_channels: of the backbone's feature. Padding changes nothing inside of the image.
    """

    def __init__(self, *, in_channels: int, channels: int):
        super().__init__()
        self.lateral = nn.Sequential(
            nn.Conv2d(in_channels, channels, kernel_size=1, bias=False), norm(channels)
        )
        self.output = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False), norm(channels)
        )
        self.project = nn.Conv2d(channels, channels, kernel_size=1)
        for conv in (self.lateral[0], self.output[0], self.project):
            nn.init.kaiming_uniform_(conv.weight, a=1)  # type: ignore[arg-type]
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]

    def forward(self, feature: Tensor, padding: Tensor, memory: Memory) -> MaskFeatures:
        """feature [B, C_in, h, w]; padding [B, H, W] bool of the image; memory of the encoder."""
        lateral = self.lateral(feature)
        height, width = lateral.shape[-2:]
        finest = F.interpolate(finest_level(memory), size=(height, width), mode="bilinear")
        is_padding = resize_padding(padding, height, width)
        joined = (lateral + finest).masked_fill(is_padding[:, None], 0)
        features = self.project(self.output(joined).relu())
        inside = ~padding
        valid_width = inside[:, 0].sum(1) * width / padding.shape[2]
        valid_height = inside[:, :, 0].sum(1) * height / padding.shape[1]
        valid = torch.stack((valid_width, valid_height), dim=-1).to(memory.valid_sizes.dtype)
        return MaskFeatures(features, valid)


def finest_level(memory: Memory) -> Tensor:
    """The finest level as a map [B, C, h, w] whose padding matches_per_object the border of the image."""
    (height, width), *_ = memory.shapes
    tokens = memory.tokens.narrow(1, 0, height * width)
    features = tokens.transpose(1, 2).unflatten(2, (height, width))
    last = (memory.valid_sizes[:, 0].long() - 1).clamp(min=0)  # column, row
    for axis, size, index in ((3, width, last[:, 0]), (2, height, last[:, 1])):
        place = torch.arange(size, device=index.device).minimum(index[:, None])
        place = place[:, None, None, :] if axis == 3 else place[:, None, :, None]
        features = features.gather(axis, place.expand(features.shape))
    return features


class MaskHeads(nn.Module):
    """What a query says: content [B, Q, C] -> class logits and mask embeddings, behind a norm."""

    def __init__(self, *, channels: int, num_classes: int, has_no_object: bool):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.class_head = class_head(channels, num_classes + has_no_object)
        self.mask_head = MLP(in_dim=channels, hidden_dim=channels, out_dim=channels, num_layers=3)
        if has_no_object:  # a softmax needs no prior against a flood of negatives
            self.class_head.reset_parameters()

    def forward(self, content: Tensor) -> tuple[Tensor, Tensor]:
        """-> logits [B, Q, K], embeddings [B, Q, C], at least float32."""
        normed = self.norm(content)
        logits = at_least_float32(self.class_head(normed))
        return logits, at_least_float32(self.mask_head(normed))


def mask_logits(embeddings: Tensor, features: Tensor) -> Tensor:
    """Embeddings [B, Q, C] and features [B, C, h, w] -> masks [B, Q, h, w]."""
    height, width = features.shape[-2:]
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, features.dtype))
    masks = embeddings @ features.flatten(2).to(embeddings.dtype)
    return masks.unflatten(2, (height, width))


def boxes_of_masks(masks: Tensor, valid_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The box around the cells where a mask [B, Q, h, w] is positive: cxcywh [B, Q, 4] in [0, 1] of
    the unpadded image, .5 where there is no such cell, and whether there is none [B, Q].

    valid_sizes [B, 2]: (w, h) of the image in cells.
    """
    height, width = masks.shape[-2:]
    valid_width, valid_height = valid_sizes[..., None].unbind(1)  # [B, 1] each
    columns = torch.arange(width, device=masks.device, dtype=valid_sizes.dtype)
    rows = torch.arange(height, device=masks.device, dtype=valid_sizes.dtype)
    is_inside = (rows < valid_height)[:, :, None] & (columns < valid_width)[:, None]  # [B, h, w]
    is_on = (masks > 0) & is_inside[:, None]

    def extent(is_hit: Tensor, cells: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.where(is_hit, cells, torch.inf).amin(-1)
        behind = torch.where(is_hit, cells + 1, 0).amax(-1)
        return first / valid, behind.minimum(valid) / valid

    (x0, x1), (y0, y1) = (
        extent(is_on.any(-2), columns, valid_width),
        extent(is_on.any(-1), rows, valid_height),
    )
    is_empty = x1 == 0
    boxes = xyxy_to_cxcywh(torch.stack((x0, y0, x1, y1), dim=-1))
    return torch.where(is_empty[..., None], 0.5, boxes), is_empty
