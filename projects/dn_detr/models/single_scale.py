"""What the single-scale methods share: one feature map, dense attention in the encoder, and layers
that attend densely in the decoder (2005.12872). They differ in queries, positions and box rules."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from dn_detr.layers.attention_blocks import SelfAttention
from dn_detr.layers.mlp import FeedForward
from dn_detr.layers.multihead_attention import (
    ConditionalCrossAttention,
    DenseAttention,
    DenseCrossAttention,
    SplitSelfAttention,
)
from dn_detr.layers.position_encoding import SinePosition
from dn_detr.models.decoder import Decoder, DecoderLayer
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.encoder import DenseEncoderLayer
from dn_detr.models.model_config import Numbers
from dn_detr.models.neck import Flatten, SingleScaleNeck

Activation = Callable[[], nn.Module]


def single_scale_detector(
    numbers: Numbers,
    in_channels: list[int],
    strides: list[int],
    *,
    temperature: float,
    encoder: nn.Module,
    query_design: nn.Module,
    decoder: Decoder,
) -> DETR:
    """On a linear projection of the coarsest feature. temperature: of the tokens' sines."""
    projection = nn.Conv2d(in_channels[-1], numbers.channels, kernel_size=1)
    return DETR(
        neck=SingleScaleNeck(projection=projection, stride=strides[-1]),
        flatten=single_scale_flatten(numbers, temperature),
        encoder=encoder,
        query_design=query_design,
        decoder=decoder,
    )


def single_scale_flatten(numbers: Numbers, temperature: float) -> Flatten:
    """Cells counted from 1 to n, as in DETR."""
    position = SinePosition(channels=numbers.channels, temperature=temperature, cell_offset=0.0)
    return Flatten(position=position, channels=numbers.channels, num_levels=1)


def dense_encoder_layers(
    numbers: Numbers, activation: Activation = nn.ReLU
) -> list[DenseEncoderLayer]:
    return [
        DenseEncoderLayer(
            attention=DenseAttention(
                channels=numbers.channels, num_heads=numbers.num_heads, dropout=numbers.dropout
            ),
            feed_forward=feed_forward(numbers, activation),
            dropout=numbers.dropout,
        )
        for _ in range(numbers.encoder_layers)
    ]


def dense_decoder_layers(numbers: Numbers) -> list[DecoderLayer]:
    """Layers that add positions to contents (2005.12872)."""
    size = {
        "channels": numbers.channels,
        "num_heads": numbers.num_heads,
        "dropout": numbers.dropout,
    }
    return [
        DecoderLayer(
            self_attention=SelfAttention(**size),
            cross_attention=DenseCrossAttention(**size),
            feed_forward=feed_forward(numbers),
            channels=numbers.channels,
            dropout=numbers.dropout,
        )
        for _ in range(numbers.decoder_layers)
    ]


def conditional_decoder_layers(
    numbers: Numbers, activation: Activation = nn.ReLU
) -> list[DecoderLayer]:
    """Layers that keep content and place apart (2108.06152)."""
    size = {
        "channels": numbers.channels,
        "num_heads": numbers.num_heads,
        "dropout": numbers.dropout,
    }
    return [
        DecoderLayer(
            self_attention=SplitSelfAttention(**size),
            cross_attention=ConditionalCrossAttention(**size, is_first=index == 0),
            feed_forward=feed_forward(numbers, activation),
            channels=numbers.channels,
            dropout=numbers.dropout,
        )
        for index in range(numbers.decoder_layers)
    ]


def feed_forward(numbers: Numbers, activation: Activation = nn.ReLU) -> FeedForward:
    return FeedForward(
        channels=numbers.channels,
        hidden_dim=numbers.feed_forward_dim,
        dropout=numbers.dropout,
        activation=activation(),
    )
