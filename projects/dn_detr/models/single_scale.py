"""Building blocks of the single-scale methods: one feature map, dense attention (2005.12872)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dn_detr.layers.mlp import FeedForward
from dn_detr.layers.multihead_attention import (
    ConditionalCrossAttention,
    DenseAttention,
    DenseCrossAttention,
    SelfAttention,
    SplitSelfAttention,
)
from dn_detr.layers.position_encoding import SinePosition
from dn_detr.models.decoder import Decoder, DecoderLayer
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.encoder import DenseEncoderLayer
from dn_detr.models.model_config import ModelConfig
from dn_detr.models.neck import Flatten, SingleScaleNeck
from dn_detr.protocols import QueryDesign

Activation = Callable[[], nn.Module]


def single_scale_detector(
    config: ModelConfig,
    in_channels: list[int],
    strides: list[int],
    *,
    temperature: float,
    encoder: nn.Module,
    query_design: QueryDesign,
    decoder: Decoder,
) -> DETR:
    """Build a detector on a 1x1 projection of the coarsest backbone feature.

    temperature: of the sine position encoding of the tokens.
    """
    projection = nn.Conv2d(in_channels[-1], config.channels, kernel_size=1)
    return DETR(
        neck=SingleScaleNeck(projection=projection, stride=strides[-1]),
        flatten=single_scale_flatten(config, temperature),
        encoder=encoder,
        query_design=query_design,
        decoder=decoder,
    )


def single_scale_flatten(config: ModelConfig, temperature: float) -> Flatten:
    """Build `Flatten` for one level; positions count cells from 1, as in DETR."""
    position = SinePosition(channels=config.channels, temperature=temperature, cell_offset=0.0)
    return Flatten(position=position, channels=config.channels, num_levels=1)


def dense_encoder_layers(
    config: ModelConfig, activation: Activation = nn.ReLU
) -> list[DenseEncoderLayer]:
    return [
        DenseEncoderLayer(
            attention=DenseAttention(
                channels=config.channels, num_heads=config.num_heads, dropout=config.dropout
            ),
            feed_forward=feed_forward(config, activation),
            dropout=config.dropout,
        )
        for _ in range(config.encoder_layers)
    ]


def dense_decoder_layers(config: ModelConfig) -> list[DecoderLayer]:
    """Build decoder layers that add the position to the content (2005.12872)."""
    size: dict[str, Any] = {
        "channels": config.channels,
        "num_heads": config.num_heads,
        "dropout": config.dropout,
    }
    return [
        DecoderLayer(
            self_attention=SelfAttention(**size),
            cross_attention=DenseCrossAttention(**size),
            feed_forward=feed_forward(config),
            channels=config.channels,
            dropout=config.dropout,
        )
        for _ in range(config.decoder_layers)
    ]


def conditional_decoder_layers(
    config: ModelConfig, activation: Activation = nn.ReLU
) -> list[DecoderLayer]:
    """Build decoder layers that keep content and position separate (2108.06152)."""
    size: dict[str, Any] = {
        "channels": config.channels,
        "num_heads": config.num_heads,
        "dropout": config.dropout,
    }
    return [
        DecoderLayer(
            self_attention=SplitSelfAttention(**size),
            cross_attention=ConditionalCrossAttention(**size, is_first=index == 0),
            feed_forward=feed_forward(config, activation),
            channels=config.channels,
            dropout=config.dropout,
        )
        for index in range(config.decoder_layers)
    ]


def feed_forward(config: ModelConfig, activation: Activation = nn.ReLU) -> FeedForward:
    return FeedForward(
        channels=config.channels,
        hidden_dim=config.feed_forward_dim,
        dropout=config.dropout,
        activation=activation(),
    )
