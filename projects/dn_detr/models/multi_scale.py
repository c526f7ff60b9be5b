"""Building blocks of the Deformable DETR family (2010.04159): multi-scale, deformable attention."""

from __future__ import annotations

from torch import nn

from dn_detr.layers.deformable_module import DeformableAttention
from dn_detr.layers.mlp import FeedForward
from dn_detr.layers.multihead_attention import SelfAttention
from dn_detr.models.decoder import Decoder, DecoderLayer, DeformableCrossAttention
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.encoder import DeformableEncoder, DeformableEncoderLayer
from dn_detr.models.model_config import LevelsConfig, ModelConfig, MultiScaleConfig
from dn_detr.models.neck import Flatten, MultiScaleNeck
from dn_detr.protocols import Predictor, QueryDesign, QueryPosition


def deformable_detector(
    config: MultiScaleConfig,
    in_channels: list[int],
    strides: list[int],
    *,
    image_position: nn.Module,
    query_design: QueryDesign,
    position: QueryPosition,
    predictor: Predictor,
) -> DETR:
    """Build a detector with deformable encoder and decoder.

    image_position: padding [B, h, w] of all levels -> position encoding [B, S, C].
    """
    return DETR(
        neck=multi_scale_neck(config, in_channels, strides),
        flatten=Flatten(
            position=image_position, channels=config.channels, num_levels=config.num_levels
        ),
        encoder=deformable_encoder(config),
        query_design=query_design,
        decoder=Decoder(
            layers=[decoder_layer(config) for _ in range(config.decoder_layers)],
            position=position,
            predictor=predictor,
        ),
    )


def multi_scale_neck(
    config: LevelsConfig, in_channels: list[int], strides: list[int]
) -> MultiScaleNeck:
    return MultiScaleNeck(
        in_channels=in_channels,
        strides=strides,
        channels=config.channels,
        num_levels=config.num_levels,
    )


def deformable_encoder(config: MultiScaleConfig) -> DeformableEncoder:
    hidden_dim = config.encoder_feed_forward_dim or config.feed_forward_dim
    return DeformableEncoder(
        [
            DeformableEncoderLayer(
                attention=deformable_attention(config),
                feed_forward=feed_forward(config, hidden_dim),
                channels=config.channels,
                dropout=config.dropout,
            )
            for _ in range(config.encoder_layers)
        ]
    )


def decoder_layer(config: MultiScaleConfig) -> DecoderLayer:
    return DecoderLayer(
        self_attention=SelfAttention(
            channels=config.channels, num_heads=config.num_heads, dropout=config.dropout
        ),
        cross_attention=DeformableCrossAttention(deformable_attention(config)),
        feed_forward=feed_forward(config),
        channels=config.channels,
        dropout=config.dropout,
    )


def deformable_attention(config: MultiScaleConfig) -> DeformableAttention:
    return DeformableAttention(
        channels=config.channels,
        num_heads=config.num_heads,
        num_levels=config.num_levels,
        num_points=config.num_points,
    )


def feed_forward(config: ModelConfig, hidden_dim: int = 0) -> FeedForward:
    return FeedForward(
        channels=config.channels,
        hidden_dim=hidden_dim or config.feed_forward_dim,
        dropout=config.dropout,
        activation=nn.ReLU(),
    )
