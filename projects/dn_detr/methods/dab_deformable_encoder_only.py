"""DAB-Deformable-DETR, deformable in the encoder only: the multi-scale model of the DN-DETR paper.

Feng Li et al., "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising", 2203.01305,
table 4 (there "DN-Deformable-DETR").

What differs from DAB-DETR:
 - several feature levels, deformable attention in the encoder (2010.04159);
 - the decoder attends densely to each level separately, with shared projections, and mixes the
   results with softmax weights predicted from the self-attention query;
 - ReLU in the feed-forward blocks; the encoder does not scale the token positions.
The published models use 3 patterns for every query and one content vector for all.

Deviations from the authors' code: those of DAB-DETR. Levels are mixed before the shared output
projection instead of after it, which is equivalent because the weights sum to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dn_detr.layers.initialization import default_, xavier_
from dn_detr.layers.mlp import FeedForward
from dn_detr.layers.multihead_attention import (
    ConditionalCrossAttention,
    ConditionalPosition,
    SplitSelfAttention,
    attend_densely,
)
from dn_detr.layers.position_encoding import SinePosition
from dn_detr.layers.query_attention import QueryAttentionMask
from dn_detr.layers.query_content import QueryContent
from dn_detr.models.decoder import Decoder
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.model_config import MultiScaleConfig, SharedContentConfig
from dn_detr.models.multi_scale import deformable_encoder, feed_forward, multi_scale_neck
from dn_detr.models.neck import Flatten
from dn_detr.models.prediction_heads import normed_iterative_refinement
from dn_detr.models.query_designs import shared_box_queries
from dn_detr.models.query_positions import ModulatedBoxPosition
from dn_detr.structures import Memory


class LevelMixingLayer(nn.Module):
    """Decoder layer whose cross-attention is a weighted sum over feature levels."""

    def __init__(
        self,
        *,
        self_attention: SplitSelfAttention,
        cross_attention: ConditionalCrossAttention,
        feed_forward: FeedForward,
        channels: int,
        num_levels: int,
        dropout: float,
    ):
        super().__init__()
        self.self_attention = self_attention
        self.level_weights = nn.Linear(channels, num_levels)
        self.cross_attention = cross_attention
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(channels)
        self.feed_forward = feed_forward
        nn.init.xavier_uniform_(self.level_weights.weight)

    def forward(
        self,
        content: Tensor,
        position: tuple[Tensor, ConditionalPosition],
        _reference: Tensor,
        memory: Memory,
        query_mask: QueryAttentionMask,
    ) -> Tensor:
        """Update content [B, Q, C]; position: for self-attention [B, Q, C], for cross-attention."""
        for_self, for_cross = position
        weights = self.level_weights(self.self_attention.query(content, for_self)).softmax(-1)
        content = self.self_attention(content, for_self, query_mask)
        update = self.attend_to_levels(content, for_cross, memory, weights)
        return self.feed_forward(self.norm(content + self.dropout(update)))

    def attend_to_levels(
        self, content: Tensor, position: ConditionalPosition, memory: Memory, weights: Tensor
    ) -> Tensor:
        """Attend from content [B, Q, C] to each level; weights [B, Q, levels] -> [B, Q, C]."""
        attention = self.cross_attention
        q, k, v = attention.project(content, position, memory)
        sizes = [height * width for height, width in memory.shapes]
        levels = zip(
            k.split(sizes, 1), v.split(sizes, 1), memory.padding.split(sizes, 1), strict=True
        )
        found = [
            attend_densely(
                q,
                keys,
                values,
                attention.num_heads,
                padding,
                dropout=attention.dropout if self.training else 0.0,
            )
            for keys, values, padding in levels
        ]
        return attention.out((torch.stack(found, dim=-1) * weights[:, :, None]).sum(-1))


@dataclass(frozen=True, kw_only=True)
class EncoderOnlyConfig(SharedContentConfig, MultiScaleConfig):
    """DAB-Deformable-DETR with a deformable encoder alone."""


def dab_deformable_encoder_only(
    config: EncoderOnlyConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Build DAB-Deformable-DETR with a deformable encoder and a dense decoder."""
    c = config
    neck, encoder = multi_scale_neck(c, in_channels, strides), deformable_encoder(c)
    design, predictor = shared_box_queries(c, content), normed_iterative_refinement(c)
    # Unlike in DAB-DETR and Deformable DETR, the authors' code draws these from default and Xavier
    # distributions, so that nothing of them is zero at the start.
    default_(neck)
    default_(predictor.heads.box_heads)
    xavier_(encoder)
    if design.shared.patterns is not None:
        nn.init.xavier_uniform_(design.shared.patterns)
    return DETR(
        neck=neck,
        flatten=Flatten(
            position=SinePosition(channels=c.channels, temperature=20.0, cell_offset=0.0),
            channels=c.channels,
            num_levels=c.num_levels,
        ),
        encoder=encoder,
        query_design=design,
        decoder=Decoder(
            layers=[decoder_layer(c, is_first=index == 0) for index in range(c.decoder_layers)],
            position=ModulatedBoxPosition(channels=c.channels),
            predictor=predictor,
        ),
    )


def decoder_layer(c: EncoderOnlyConfig, *, is_first: bool) -> LevelMixingLayer:
    size: dict[str, Any] = {"channels": c.channels, "num_heads": c.num_heads, "dropout": c.dropout}
    return LevelMixingLayer(
        self_attention=SplitSelfAttention(**size),
        cross_attention=ConditionalCrossAttention(**size, is_first=is_first),
        feed_forward=feed_forward(c),
        channels=c.channels,
        num_levels=c.num_levels,
        dropout=c.dropout,
    )
