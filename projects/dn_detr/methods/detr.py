"""DETR: detection as set prediction by a transformer.

Nicolas Carion et al., "End-to-End Object Detection with Transformers", 2005.12872.

What it is:
 - a transformer maps the last feature map and a fixed set of learned queries to predictions;
 - a query is a learned position with zero initial content; there is no reference, and the heads
   regress boxes directly;
 - a softmax over the classes and "no object" (LOSS.KIND "softmax"); focal loss also works;
 - the predictions of all layers are matched and trained; all layers share one pair of heads and one
   norm.

Denoising (2203.01305 applies it to vanilla DETR, code not released): the position is a linear
embedding of the noised box, the content the label embedding.
"""

from __future__ import annotations

from torch import nn

from dn_detr.layers.initialization import default_
from dn_detr.layers.query_content import QueryContent
from dn_detr.models.decoder import Decoder
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.encoder import DenseEncoder
from dn_detr.models.learned_queries import zero_content_queries
from dn_detr.models.model_config import BoxConfig
from dn_detr.models.prediction_heads import DirectBoxes, Heads, shared_heads
from dn_detr.models.query_positions import LearnedPosition
from dn_detr.models.single_scale import (
    dense_decoder_layers,
    dense_encoder_layers,
    single_scale_detector,
)


def detr(
    config: BoxConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Build DETR."""
    c = config
    return single_scale_detector(
        c,
        in_channels,
        strides,
        temperature=10000.0,
        encoder=DenseEncoder(dense_encoder_layers(c)),
        query_design=zero_content_queries(c, content, point=None),
        decoder=Decoder(
            layers=dense_decoder_layers(c),
            position=LearnedPosition(),
            predictor=DirectBoxes(heads=heads(c), norm=nn.LayerNorm(c.channels)),
        ),
    )


def heads(c: BoxConfig) -> Heads:
    """Make shared heads with default initialization.

    There is no reference to start boxes at, and a softmax needs no class prior.
    """
    shared = shared_heads(c)
    default_(shared.box_heads)
    if c.has_no_object:
        default_(shared.class_heads)
    return shared
