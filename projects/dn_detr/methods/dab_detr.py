"""DAB-DETR: queries are dynamic anchor boxes. With denoising, this is DN-DETR.

Shilong Liu et al., "DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR", 2201.12329.
Feng Li et al., "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising", 2203.01305.

What differs from DETR:
 - a query is a learned box (the reference, refined by every layer) without its own content: the
   content is zero, or in DN-DETR one shared vector (`shares_content`), the label "unknown" in the
   paper; optionally, several learned patterns are combined with each box (`num_patterns`);
 - in self-attention the position is an MLP of the sines of the box; cross-attention compares the
   sines of its centre with those of the tokens, separately from the content (2108.06152), scaled by
   the content from the second layer on and modulated by the box size and a size predicted from
   the content;
 - PReLU in the feed-forward blocks, sine temperature 20 for the image;
 - all layers share one pair of heads; predictions use normalised content, the reference update
   unnormalised content, and the predicted box is an offset from a reference with gradient (look
   forward twice, before 2203.03605 named it). All three follow the authors' code.

As in the code but not the paper, the encoder scales token positions by an MLP of the tokens.

Deviations from the authors' code: the shared content vector is a separate parameter, not the last
row of the label embedding, so that a checkpoint trained with denoising loads into a model without
it (and into one for other classes); empty denoising queries are masked (`auxiliary.denoising`).
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
    """Dense encoder whose layers scale the token positions by a shared MLP of the tokens."""

    def __init__(self, layers: Sequence[nn.Module], *, channels: int):
        super().__init__(layers)
        self.scale = MLP(in_dim=channels, hidden_dim=channels, out_dim=channels, num_layers=2)
        xavier_(self.scale)

    def forward(self, memory: Memory) -> Memory:
        """Encode the tokens [B, S, C] of the memory."""
        for layer in self.layers:
            position = memory.position * self.scale(memory.tokens)
            memory = replace(memory, tokens=layer(replace(memory, position=position)))
        return memory


def dab_detr(
    config: SharedContentConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Build DAB-DETR or, with denoising, DN-DETR."""
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
