"""DAB-Deformable-DETR, fully deformable: dynamic anchor boxes in Deformable DETR.

Shilong Liu et al., "DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR", 2201.12329,
appendix C; with denoising it is the DN-Deformable-DETR (v2) of 2203.01305.

What differs from DETR:
 - several feature levels, deformable attention in encoder and decoder (2010.04159);
 - a query is a learned box (the reference, moved by every layer) and learned content;
 - its position is an MLP of the sines of the box, from the second layer on scaled by the content;
 - every layer has heads of its own; no norm stands before them, so that a layer's predicted box is
   the reference of the next; that reference is detached (look forward once).

Deviations from the authors' code: they scale the box by the share of the finest map that is not
padding before its sines (`scales_with_canvas`, off unless their weights are loaded); they leave
empty denoising slots visible (see `assists.denoising`).
"""

from __future__ import annotations

from torch import nn

from dn_detr.layers.attention import DeformableAttention, SelfAttention
from dn_detr.layers.content import QueryContent
from dn_detr.layers.mlp import FeedForward
from dn_detr.layers.position import SinePosition
from dn_detr.models.decoder import BoxPosition, Decoder, DecoderLayer, DeformableCrossAttention
from dn_detr.models.detr import DETR
from dn_detr.models.encoder import DeformableEncoder, DeformableEncoderLayer
from dn_detr.models.neck import Flatten, MultiScaleNeck
from dn_detr.models.numbers import Numbers
from dn_detr.models.predictor import Heads, Refined
from dn_detr.models.queries import BoxQueries


def dab_deformable(
    numbers: Numbers, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Neck, encoder, queries and decoder of the fully deformable DAB-DETR."""
    n = numbers

    def deformable() -> DeformableAttention:
        return DeformableAttention(
            channels=n.channels,
            num_heads=n.num_heads,
            num_levels=n.num_levels,
            num_points=n.num_points,
        )

    def feed_forward() -> FeedForward:
        return FeedForward(
            channels=n.channels,
            hidden_dim=n.feed_forward_dim,
            dropout=n.dropout,
            activation=nn.ReLU(),
        )

    def encoder_layer() -> DeformableEncoderLayer:
        return DeformableEncoderLayer(
            attention=deformable(), feed_forward=feed_forward(), dropout=n.dropout
        )

    def decoder_layer() -> DecoderLayer:
        return DecoderLayer(
            self_attention=SelfAttention(
                channels=n.channels, num_heads=n.num_heads, dropout=n.dropout
            ),
            cross_attention=DeformableCrossAttention(deformable()),
            feed_forward=feed_forward(),
            channels=n.channels,
            dropout=n.dropout,
        )

    heads = Heads(
        channels=n.channels,
        num_classes=n.num_classes,
        num_layers=n.decoder_layers,
        shared=False,
    )
    return DETR(
        neck=MultiScaleNeck(
            in_channels=in_channels,
            strides=strides,
            channels=n.channels,
            num_levels=n.num_levels,
        ),
        flatten=Flatten(
            position=SinePosition(channels=n.channels, temperature=10000.0, cell_offset=-0.5),
            channels=n.channels,
            num_levels=n.num_levels,
        ),
        encoder=DeformableEncoder([encoder_layer() for _ in range(n.encoder_layers)]),
        query_design=BoxQueries(content=content, num_queries=n.num_queries, epsilon=n.epsilon),
        decoder=Decoder(
            layers=[decoder_layer() for _ in range(n.decoder_layers)],
            position=BoxPosition(channels=n.channels, scales_with_canvas=n.scales_with_canvas),
            predictor=Refined(
                heads=heads, norm=None, looks_forward_twice=False, epsilon=n.epsilon
            ),
        ),
    )
