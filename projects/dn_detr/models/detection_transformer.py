"""The assembly: one forward from features to predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from dn_detr.protocols import QueryDesign, QuerySource
from dn_detr.structures import Predictions, Queries, Targets


class DETR(nn.Module):
    """A detection transformer without its backbone: (features, padding, targets=None).

    features: list of [B, C_i, h_i, w_i]; padding [B, H, W] bool, True outside the image. With
    `targets` the auxiliary queries add their training-only queries; without, this is the inference model,
    whatever the mode of the module. Ground truth enters nowhere else. prompt: (queries, source) ->
    queries, what a user knows of the images, at inference (`auxiliary.box_prompts.add_prompts`).

    mask_head: (finest feature, padding, memory) -> MaskFeatures, of a page that predicts masks; then
    the finest feature is for it alone.
    """

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
        prompt: Callable[[Queries, QuerySource], Queries] | None = None,
    ) -> Predictions:
        if self.mask_head is not None:
            finest, *features = features
        memory = self.encoder(self.flatten(self.neck(features, padding)))
        if self.mask_head is not None:
            memory = replace(memory, mask_features=self.mask_head(finest, padding, memory))
        source = self.query_design.bind(memory)  # type: ignore[operator]
        queries = source.queries()
        if targets is not None:
            for assist in self.auxiliary:
                queries = assist(queries, source, targets)
        if prompt is not None:
            queries = prompt(queries, source)
        return self.decoder(queries, memory)
