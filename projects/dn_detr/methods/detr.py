"""DETR: detection as set prediction by a transformer.

Nicolas Carion et al., "End-to-End Object Detection with Transformers", 2005.12872.

What it is:
 - a transformer between the last feature map and a fixed set of learned queries;
 - a query is a learned vector, added as a position; its content starts from zero, and there is no
   reference: the heads say boxes outright;
 - a softmax over the classes and "no object" (LOSS.KIND "softmax"); focal loss also works;
 - predictions of all layers are matched and trained, by one head and one norm.

Denoising (2203.01305, on vanilla DETR, whose code was not released): a linear embedding of the
noised box is the position, the label is the content.
"""

from __future__ import annotations

from torch import nn

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
    """Neck, encoder, queries and decoder of DETR."""
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
    """Boxes start anywhere, since there is no base for them to start at; and so do the classes of a
    softmax, which needs no prior against a flood of negatives."""
    made = shared_heads(c)
    made.box_heads[0].layers[-1].reset_parameters()  # type: ignore[index, union-attr]
    if c.has_no_object:
        made.class_heads[0].reset_parameters()  # type: ignore[operator]
    return made
