"""Mask features, mask embeddings and their dot product (2112.01527, sec. 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dn_detr.layers.box_ops import at_least_float32, xyxy_to_cxcywh
from dn_detr.layers.mlp import MLP
from dn_detr.models.neck import norm, resize_padding
from dn_detr.structures import MaskFeatures, Memory


class MaskHead(nn.Module):
    """Mask features from the finest encoder level and a finer backbone feature, as in an FPN.

    The encoder level is upsampled bilinearly (2112.01527, code). Padding is masked out before the
    3x3 convolution, but still enters the statistics of the group norms.
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
        """Return mask features [B, C, h, w] from feature [B, C_in, h, w], padding [B, H, W]."""
        lateral = self.lateral(feature)
        height, width = lateral.shape[-2:]
        finest = finest_level(memory)
        joined = lateral + F.interpolate(finest, size=(height, width), mode="bilinear")
        joined = joined.masked_fill(resize_padding(padding, height, width)[:, None], 0)
        features = self.project(self.output(joined).relu())
        inside = ~padding
        valid_width = inside[:, 0].sum(1) * width / padding.shape[2]
        valid_height = inside[:, :, 0].sum(1) * height / padding.shape[1]
        valid = torch.stack((valid_width, valid_height), dim=-1).to(memory.valid_sizes.dtype)
        return MaskFeatures(features, valid)


def finest_level(memory: Memory) -> Tensor:
    """Return the finest level [B, C, h, w], its padding replaced by the border."""
    (height, width), *_ = memory.shapes
    tokens = memory.tokens.narrow(1, 0, height * width)
    features = tokens.transpose(1, 2).unflatten(2, (height, width))
    last = (memory.valid_sizes[:, 0].long() - 1).clamp(min=0)  # column, row
    for axis, size, index in ((3, width, last[:, 0]), (2, height, last[:, 1])):
        source = torch.arange(size, device=index.device).minimum(index[:, None])
        source = source[:, None, None, :] if axis == 3 else source[:, None, :, None]
        features = features.gather(axis, source.expand(features.shape))
    return features


class MaskHeads(nn.Module):
    """Class head and mask embedding head after a shared norm.

    Classes have no low prior probability at the start, as in the authors' code, also of Mask DINO.

    has_no_object: add a "no object" logit, for a softmax over classes.
    """

    def __init__(self, *, channels: int, num_classes: int, has_no_object: bool):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.class_head = nn.Linear(channels, num_classes + has_no_object)
        self.mask_head = MLP(in_dim=channels, hidden_dim=channels, out_dim=channels, num_layers=3)

    def forward(self, content: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, Q, K] and mask embeddings [B, Q, C], at least float32."""
        normed = self.norm(content)
        logits = at_least_float32(self.class_head(normed))
        return logits, at_least_float32(self.mask_head(normed))


def mask_logits(embeddings: Tensor, features: Tensor) -> Tensor:
    """Return mask logits [B, Q, h, w] from embeddings [B, Q, C] and features [B, C, h, w]."""
    height, width = features.shape[-2:]
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, features.dtype))
    masks = embeddings @ features.flatten(2).to(embeddings.dtype)
    return masks.unflatten(2, (height, width))


def boxes_of_masks(masks: Tensor, valid_sizes: Tensor, last: int = 1) -> tuple[Tensor, Tensor]:
    """Compute the bounding boxes of masks (logits above 0).

    Args:
        masks: Logits [B, Q, h, w].
        valid_sizes: [B, 2], (w, h) of the unpadded image in cells.
        last: How much of their last row and column the boxes hold.

    Returns:
        Boxes [B, Q, 4] cxcywh in [0, 1] of the unpadded image, 0.5 for empty masks, and is_empty
        [B, Q] bool.
    """
    height, width = masks.shape[-2:]
    valid_width, valid_height = valid_sizes[..., None].unbind(1)  # [B, 1] each
    columns = torch.arange(width, device=masks.device, dtype=valid_sizes.dtype)
    rows = torch.arange(height, device=masks.device, dtype=valid_sizes.dtype)
    is_inside = (rows < valid_height)[:, :, None] & (columns < valid_width)[:, None]  # [B, h, w]
    is_on = (masks > 0) & is_inside[:, None]

    def extent(is_covered: Tensor, cells: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.where(is_covered, cells, torch.inf).amin(-1)
        end = torch.where(is_covered, cells + last, 0).amax(-1)
        return first / valid, end.minimum(valid) / valid

    (x0, x1), (y0, y1) = (
        extent(is_on.any(-2), columns, valid_width),
        extent(is_on.any(-1), rows, valid_height),
    )
    is_empty = ~is_on.flatten(2).any(-1)
    boxes = xyxy_to_cxcywh(torch.stack((x0, y0, x1, y1), dim=-1))
    return torch.where(is_empty[..., None], 0.5, boxes), is_empty
