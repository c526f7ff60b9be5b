"""The inference of a page of `dn_detr.methods` as a function of tensors; what goes in and comes out says
`graphs`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.d2.meta_arch import DenoisingDETR
from dn_detr.models.mask_postprocess import best_masks
from dn_detr.models.postprocess import best_detections


class Detect(nn.Module):
    """A page, with masks or without."""

    def __init__(self, model: DenoisingDETR):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        normalised, padding = prepare(model, images, sizes)
        features = model.backbone(normalised)
        predictions = model.core([features[name] for name in model.in_features], padding)
        best = {"top_k": model.top_k, "has_no_object": model.has_no_object}
        if model.has_masks:
            return best_masks(predictions, sizes, padding, **best)
        return best_detections(predictions, **best)


def prepare(model: nn.Module, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised images, 0 outside, and their padding [B, H, W] bool."""
    y, x = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    height, width = sizes[:, :, None, None].unbind(1)  # [B, 1, 1] each
    padding = (y[:, None] >= height) | (x >= width)
    normalised = (images - model.pixel_mean) / model.pixel_std
    return torch.where(padding[:, None], 0.0, normalised), padding
