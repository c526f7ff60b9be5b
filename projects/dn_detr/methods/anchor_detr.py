"""Anchor DETR: queries are anchor points, each combined with several learned patterns.

Yingming Wang et al., "Anchor DETR: Query Design for Transformer-Based Object Detection",
2109.07107.

What differs from DETR:
 - each query pairs a learned anchor point (no sigmoid, never refined) with one of a few learned
   patterns as its content (`num_patterns`, 3); boxes are predicted as offsets from the point;
 - positions are MLPs of sines: of the point in self-attention, of x and y separately elsewhere,
   where queries, columns and rows share one MLP;
 - the encoder and cross-attention use row-column attention (`layers.row_column_attention`);
 - the projected feature is normalised; no norm precedes the heads;
 - all layers start from equal values, most of them PyTorch's default (code).

Denoising (2203.01305 applies it to Anchor DETR, code not released): only the centre of the noised
box is used, so only centre noise has an effect; the label embedding replaces the pattern.

Deviation from the authors' code: row and column means exclude padded cells, so that the result for
an image does not depend on the other images in the batch (`models.published` includes them).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dn_detr.layers.box_ops import keep_inside
from dn_detr.layers.initialization import copies, default_
from dn_detr.layers.mlp import MLP, FeedForward
from dn_detr.layers.multihead_attention import SelfAttention
from dn_detr.layers.position_encoding import sine, sine_of_reference
from dn_detr.layers.query_content import QueryContent, SharedContent
from dn_detr.layers.row_column_attention import RowColumnAttention
from dn_detr.models.decoder import Decoder, DecoderLayer
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.model_config import ModelConfig, PatternConfig
from dn_detr.models.neck import SingleScaleNeck, norm
from dn_detr.models.prediction_heads import PointOffsetBoxes, shared_heads
from dn_detr.models.query_designs import AnchorParameters, SharedBoxQueries
from dn_detr.models.single_scale import feed_forward, single_scale_flatten
from dn_detr.structures import Memory

TEMPERATURE = 10000.0


class AxisPosition(nn.Module):
    """Position of one coordinate: an MLP of its sines (sec. 3.2)."""

    def __init__(self, *, channels: int):
        super().__init__()
        self.channels = channels
        self.mlp = MLP(in_dim=channels, hidden_dim=channels, out_dim=channels, num_layers=2)

    def forward(self, coordinate: Tensor, dtype: torch.dtype) -> Tensor:
        """Encode [...] in [0, 1] -> [..., C] of the given dtype."""
        return self.mlp(sine(coordinate, self.channels, TEMPERATURE).to(dtype))

    def of_map(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Encode the centres of the columns [B, w, C] and rows [B, h, C] of a single-level map.

        Padding repeats the last column and row, as in the authors' code.
        """
        height, width = memory.shapes[0]
        valid = memory.valid_sizes[:, 0].clamp(min=1)
        x = torch.arange(width, device=valid.device, dtype=valid.dtype) + 0.5
        y = torch.arange(height, device=valid.device, dtype=valid.dtype) + 0.5
        dtype = memory.tokens.dtype
        x, y = x.minimum(valid[:, :1] - 0.5), y.minimum(valid[:, 1:] - 0.5)
        return self(x / valid[:, :1], dtype), self(y / valid[:, 1:], dtype)


class RowColumnPosition(NamedTuple):
    """Positions for cross-attention: x and y of the queries, [B, Q, C] each; columns [B, w, C] and
    rows [B, h, C] of the map.
    """

    query: tuple[Tensor, Tensor]
    axes: tuple[Tensor, Tensor]


class PointPosition(nn.Module):
    """Query positions from the anchor points.

    Args:
        axis: shared with the encoder.
    """

    def __init__(self, *, channels: int, axis: AxisPosition):
        super().__init__()
        self.channels = channels
        self.axis = axis
        self.point_mlp = MLP(in_dim=channels, hidden_dim=channels, out_dim=channels, num_layers=2)

    def forward(
        self, layer: int, content: Tensor, reference: Tensor, learned: None, memory: Memory
    ) -> tuple[Tensor, RowColumnPosition]:
        """Encode references [B, Q, 2] -> self-attention position [B, Q, C], cross-attention one."""
        encoded = sine_of_reference(reference, self.channels // 2, TEMPERATURE)
        x, y = (self.axis(axis, content.dtype) for axis in reference.unbind(-1))
        for_self = self.point_mlp(encoded.to(content.dtype))
        return for_self, RowColumnPosition(query=(x, y), axes=self.axis.of_map(memory))


class RowColumnCrossAttention(nn.Module):
    """Row-column cross-attention for `DecoderLayer`."""

    def __init__(self, attention: RowColumnAttention):
        super().__init__()
        self.attention = attention

    def forward(
        self, content: Tensor, position: RowColumnPosition, reference: Tensor, memory: Memory
    ) -> Tensor:
        """Attend from content [B, Q, C] to memory -> update [B, Q, C]; reference is unused."""
        tokens, padding = as_map(memory)
        return self.attention(content, position.query, tokens, position.axes, padding)


class RowColumnEncoder(nn.Module):
    """Encoder layers of row-column self-attention and feed-forward."""

    def __init__(self, c: ModelConfig, *, axis: AxisPosition):
        super().__init__()
        self.axis = axis
        self.layers = nn.ModuleList(copies(lambda: RowColumnEncoderLayer(c), c.encoder_layers))

    def forward(self, memory: Memory) -> Memory:
        """Encode the tokens [B, h * w, C] of a single-level memory."""
        axes = self.axis.of_map(memory)
        for layer in self.layers:
            memory = replace(memory, tokens=layer(memory, axes))
        return memory


class RowColumnEncoderLayer(nn.Module):
    """Row-column self-attention and feed-forward, each with a residual and a norm."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.attention = row_column_attention(c)
        self.dropout = nn.Dropout(c.dropout)
        self.norm = nn.LayerNorm(c.channels)
        self.feed_forward = default_feed_forward(c)

    def forward(self, memory: Memory, axes: tuple[Tensor, Tensor]) -> Tensor:
        """Update the tokens [B, h * w, C]; axes: positions of columns [B, w, C], rows [B, h, C]."""
        tokens, padding = as_map(memory)
        columns, rows = axes
        x = columns[:, None].expand_as(tokens).flatten(1, 2)
        y = rows[:, :, None].expand_as(tokens).flatten(1, 2)
        update = self.attention(memory.tokens, (x, y), tokens, axes, padding)
        return self.feed_forward(self.norm(memory.tokens + self.dropout(update)))


def as_map(memory: Memory) -> tuple[Tensor, Tensor]:
    """Reshape a single-level memory to tokens [B, h, w, C] and padding [B, h, w]."""
    size = memory.shapes[0]
    return memory.tokens.unflatten(1, size), memory.padding.unflatten(1, size)


class PointQueries(SharedBoxQueries):
    """Learned anchor points, drawn from [0, 1]; boxes are reduced to their centres."""

    def new_parameters(self, num_queries: int, own_head: bool = True) -> AnchorParameters:
        """Make the parameters of extra queries: points [N, 2]."""
        return AnchorParameters(torch.rand(num_queries, 2))

    def references(self, anchors: Tensor) -> Tensor:
        """Return the points [N, 2] unchanged."""
        return anchors

    def reference_of(self, boxes: Tensor) -> Tensor:
        """Take the clamped centres [B, T, 2] of boxes [B, T, 4]."""
        return keep_inside(boxes[..., :2], self.epsilon)


def row_column_attention(c: ModelConfig) -> RowColumnAttention:
    return RowColumnAttention(channels=c.channels, num_heads=c.num_heads, dropout=c.dropout)


def default_feed_forward(c: ModelConfig) -> FeedForward:
    """Feed-forward block that does not start Xavier-uniformly, as in the authors' code."""
    block = feed_forward(c)
    default_(block)
    return block


def decoder_layer(c: ModelConfig) -> DecoderLayer:
    attention = SelfAttention(channels=c.channels, num_heads=c.num_heads, dropout=c.dropout)
    default_(attention.out)
    nn.init.zeros_(attention.out.bias)
    return DecoderLayer(
        self_attention=attention,
        cross_attention=RowColumnCrossAttention(row_column_attention(c)),
        feed_forward=default_feed_forward(c),
        channels=c.channels,
        dropout=c.dropout,
    )


def anchor_detr(
    config: PatternConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Build Anchor DETR."""
    c = config
    projection = nn.Conv2d(in_channels[-1], c.channels, kernel_size=1)
    nn.init.xavier_uniform_(projection.weight)
    nn.init.zeros_(projection.bias)  # type: ignore[arg-type]
    axis = AxisPosition(channels=c.channels)
    return DETR(
        neck=SingleScaleNeck(
            projection=nn.Sequential(projection, norm(c.channels)), stride=strides[-1]
        ),
        flatten=single_scale_flatten(c, TEMPERATURE),
        encoder=RowColumnEncoder(c, axis=axis),
        query_design=PointQueries(
            content=content,
            shared=SharedContent(content=content, is_learned=False, num_patterns=c.num_patterns),
            num_queries=c.num_queries,
            epsilon=c.epsilon,
        ),
        decoder=Decoder(
            layers=copies(lambda: decoder_layer(c), c.decoder_layers),
            position=PointPosition(channels=c.channels, axis=axis),
            predictor=PointOffsetBoxes(
                heads=shared_heads(c, size_bias=-2.0), norm=None, epsilon=c.epsilon
            ),
        ),
    )
