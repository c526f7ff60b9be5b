"""DAB-DETR: queries are dynamic anchor boxes; with denoising it is DN-DETR itself.

Shilong Liu et al., "DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR", 2201.12329.
Feng Li et al., "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising", 2203.01305.

What differs from DETR:
 - a query is a learned box (the reference, moved by every layer) without content of its own: it
   starts from zero, in DN-DETR from one vector that all share (`shares_content`), which the paper
   calls the label "unknown"; optionally several patterns ask each box (`num_patterns`);
 - in self-attention its position is an MLP of the sines of the box; in cross-attention the sines of
   its centre, from the second layer on scaled by the content, are compared with those of the
   tokens, apart from the content (2108.06152), in proportion to a width and a height that the
   content asks for;
 - PReLU in the feed-forward blocks, sines of temperature 20 for the image;
 - one head for all layers; it predicts from normed content and moves the reference by un-normed
   content, and the predicted box is an offset from a reference with gradient (looking forward
   twice, before 2203.03605 named it). All three as in the authors' code.

As in the code, not in the paper: the encoder scales the position of the tokens by an MLP of them.

Deviations from the authors' code: the vector that all queries share is a row of its own, not the
last row of the label table, so that a denoised checkpoint loads into a plain model that shares
content (and into one for other classes); empty denoising slots are hidden (`auxiliary.denoising`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from dn_detr.layers.initialization import xavier_
from dn_detr.layers.mlp import MLP
from dn_detr.layers.query_content import QueryContent
from dn_detr.models.decoder import Decoder
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.encoder import DenseEncoder
from dn_detr.models.model_config import SharedContentConfig
from dn_detr.models.prediction_heads import normed_iterative_refinement
from dn_detr.models.query_designs import shared_box_queries
from dn_detr.models.query_positions import ModulatedBoxPosition
from dn_detr.models.single_scale import (
    conditional_decoder_layers,
    dense_encoder_layers,
    single_scale_detector,
)
from dn_detr.structures import Memory


class ScaledDenseEncoder(DenseEncoder):
    """A dense encoder that scales the tokens' position by an MLP of the tokens in every layer."""

    def __init__(self, layers: Sequence[nn.Module], *, channels: int):
        super().__init__(layers)
        self.scale = MLP(in_dim=channels, hidden_dim=channels, out_dim=channels, num_layers=2)
        xavier_(self.scale)

    def forward(self, memory: Memory) -> Memory:
        for layer in self.layers:
            position = memory.position * self.scale(memory.tokens)
            memory = replace(memory, tokens=layer(replace(memory, position=position)))
        return memory


def dab_detr(
    config: SharedContentConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Neck, encoder, queries and decoder of DAB-DETR and DN-DETR."""
    c = config
    return single_scale_detector(
        c,
        in_channels,
        strides,
        temperature=20.0,
        encoder=ScaledDenseEncoder(dense_encoder_layers(c, nn.PReLU), channels=c.channels),
        query_design=shared_box_queries(c, content),
        decoder=Decoder(
            layers=conditional_decoder_layers(c, nn.PReLU),
            position=ModulatedBoxPosition(channels=c.channels),
            predictor=normed_iterative_refinement(c),
        ),
    )
