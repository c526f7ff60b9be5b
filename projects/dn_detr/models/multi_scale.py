"""What the methods of the Deformable DETR family share (2010.04159): several feature levels, and
deformable attention in encoder and decoder. They differ in queries, positions and box rules."""

from __future__ import annotations

from torch import nn

from dn_detr.layers.attention_blocks import DeformableAttention, SelfAttention
from dn_detr.layers.mlp import FeedForward
from dn_detr.models.decoder import Decoder, DecoderLayer, DeformableCrossAttention
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.encoder import DeformableEncoder, DeformableEncoderLayer
from dn_detr.models.model_config import Numbers
from dn_detr.models.neck import Flatten, MultiScaleNeck


def deformable_detector(
    numbers: Numbers,
    in_channels: list[int],
    strides: list[int],
    *,
    image_position: nn.Module,
    query_design: nn.Module,
    position: nn.Module,
    predictor: nn.Module,
) -> DETR:
    """A detector that is deformable throughout. image_position: of the cells of a feature map."""
    return DETR(
        neck=multi_scale_neck(numbers, in_channels, strides),
        flatten=Flatten(
            position=image_position, channels=numbers.channels, num_levels=numbers.num_levels
        ),
        encoder=deformable_encoder(numbers),
        query_design=query_design,
        decoder=Decoder(
            layers=[decoder_layer(numbers) for _ in range(numbers.decoder_layers)],
            position=position,
            predictor=predictor,
        ),
    )


def multi_scale_neck(numbers: Numbers, in_channels: list[int], strides: list[int]):
    return MultiScaleNeck(
        in_channels=in_channels,
        strides=strides,
        channels=numbers.channels,
        num_levels=numbers.num_levels,
    )


def deformable_encoder(numbers: Numbers) -> DeformableEncoder:
    hidden_dim = numbers.encoder_feed_forward_dim or numbers.feed_forward_dim
    return DeformableEncoder(
        [
            DeformableEncoderLayer(
                attention=deformable_attention(numbers),
                feed_forward=feed_forward(numbers, hidden_dim),
                dropout=numbers.dropout,
            )
            for _ in range(numbers.encoder_layers)
        ]
    )


def decoder_layer(numbers: Numbers) -> DecoderLayer:
    return DecoderLayer(
        self_attention=SelfAttention(
            channels=numbers.channels, num_heads=numbers.num_heads, dropout=numbers.dropout
        ),
        cross_attention=DeformableCrossAttention(deformable_attention(numbers)),
        feed_forward=feed_forward(numbers),
        channels=numbers.channels,
        dropout=numbers.dropout,
    )


def deformable_attention(numbers: Numbers) -> DeformableAttention:
    return DeformableAttention(
        channels=numbers.channels,
        num_heads=numbers.num_heads,
        num_levels=numbers.num_levels,
        num_points=numbers.num_points,
    )


def feed_forward(numbers: Numbers, hidden_dim: int = 0) -> FeedForward:
    return FeedForward(
        channels=numbers.channels,
        hidden_dim=hidden_dim or numbers.feed_forward_dim,
        dropout=numbers.dropout,
        activation=nn.ReLU(),
    )
