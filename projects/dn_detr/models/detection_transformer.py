"""Detection transformer from backbone features to predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dn_detr.protocols import QueryDesign
from dn_detr.structures import Predictions, Queries, Targets


class DETR(nn.Module):
    """Detection transformer without its backbone.

    The modules in `auxiliary` add training-only queries; ground truth is used nowhere else.

    Args:
        neck: (features, padding) -> FeatureMaps.
        flatten: FeatureMaps -> Memory.
        encoder: Memory -> Memory.
        query_design: See `models.query_designs`.
        decoder: (Queries, Memory) -> Predictions.
        mask_head: (finest feature, padding, memory) -> MaskFeatures, or None for a model without
            masks. With a mask head, the neck does not get the finest feature.
    """

    as_published = False
    """With a mask head, padding is part of the image (Mask2Former, Mask DINO)."""

    def __init__(
        self,
        *,
        neck: nn.Module,
        flatten: nn.Module,
        encoder: nn.Module,
        query_design: QueryDesign,
        decoder: nn.Module,
        mask_head: nn.Module | None = None,
    ):
        super().__init__()
        self.neck = neck
        self.flatten = flatten
        self.encoder = encoder
        self.query_design = query_design
        self.decoder = decoder
        self.mask_head = mask_head
        self.auxiliary = nn.ModuleList()

    def forward(
        self,
        features: list[Tensor],
        padding: Tensor,
        targets: Targets | None = None,
        prompt: Callable[[Queries, Any], Queries] | None = None,
    ) -> Predictions:
        """Predict the objects of a batch.

        Args:
            features: Backbone features [B, C_i, h_i, w_i], fine to coarse.
            padding: [B, H, W] bool, True outside the image.
            targets: Ground truth for the auxiliary queries. None runs the inference model, also in
                training mode.
            prompt: (queries, source) -> queries, adds box prompts at inference
                (`auxiliary.box_prompts.add_prompts`).
        """
        canvas_per_image = None
        if self.mask_head is not None:
            finest, *features = features
            if self.as_published:
                canvas_per_image = share_of_canvas(padding).reciprocal()
                padding = torch.zeros_like(padding)
        memory = self.encoder(self.flatten(self.neck(features, padding)))
        if self.mask_head is not None:
            memory = replace(memory, mask_features=self.mask_head(finest, padding, memory))
        source = self.query_design.bind(memory)
        queries = source.queries()
        if targets is not None:
            for auxiliary in self.auxiliary:
                queries = auxiliary(queries, source, targets)
        if prompt is not None:
            queries = prompt(queries, source)
        predictions = self.decoder(queries, memory)
        if canvas_per_image is None or predictions.boxes is None:
            return predictions
        return replace(predictions, boxes=predictions.boxes * canvas_per_image[:, None])


def share_of_canvas(padding: Tensor) -> Tensor:
    """Return what image sides are of the canvas's [B, 4] (w, h, w, h); padding [B, H, W] bool."""
    inside = (~padding).float()
    return torch.stack((inside[:, 0].mean(1), inside[:, :, 0].mean(1)), dim=1).repeat(1, 2)
