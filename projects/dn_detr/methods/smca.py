"""SMCA: decoder attention under a Gaussian whose place and size the query chooses.

Peng Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention", 2101.07448;
single and multi-scale.

What differs from DETR:
 - before anything else, a layer reads from content and slot where each head looks (an offset from
   the query's centre) and how narrowly, for width and height apart; the logarithm of that Gaussian
   is added to the logits of cross-attention;
 - the centre follows from the slot once, before the first layer; all boxes are offsets from it;
 - focal loss with 300 queries;
 - multi-scale (`smca_multiscale`): the encoder attends within each scale, in its middle layer
   across all; in the decoder, each query weighs the scales, which are attended to one by one.

Denoising (not in the paper): the noised centre is the centre, a linear embedding of the noised box
takes the place of the learned slot, the label is the content.

Deviations from the paper, as in the authors' code: the Gaussian's scale is an inverse width (the
squared distance is multiplied by its square), and the centre has an MLP of three layers. From the
code: centres and offsets are in cells of the map, counted by whole cells; theirs counts the image
in steps of 32 pixels, whatever the stride. The multi-scale model follows the paper; the code that
was released under this name is another network, with depthwise convolutions as its encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dn_detr.layers.attention_blocks import SelfAttention
from dn_detr.layers.initialization import xavier_, xavier_fused_
from dn_detr.layers.mlp import MLP
from dn_detr.layers.multihead_attention import attend_densely
from dn_detr.layers.position_encoding import SinePosition
from dn_detr.layers.query_attention import QueryAttentionMask
from dn_detr.layers.query_content import QueryContent
from dn_detr.models.decoder import Decoder
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.encoder import DenseEncoder
from dn_detr.models.learned_queries import LearnedQueries, zero_content_queries
from dn_detr.models.model_config import BoxConfig, ModelConfig
from dn_detr.models.multi_scale import multi_scale_neck
from dn_detr.models.neck import Flatten
from dn_detr.models.prediction_heads import PointOffsetBoxes, shared_heads
from dn_detr.models.query_positions import LearnedPosition
from dn_detr.models.single_scale import (
    dense_encoder_layers,
    feed_forward,
    single_scale_detector,
)
from dn_detr.structures import Memory

SMOOTHNESS = 8.0
"""Divides the exponent of the Gaussian (sec. 4.1; "smooth" in the code)."""


class GaussianAttention(nn.Module):
    """Cross-attention with a Gaussian prior for each head and scale (sec. 3.2 and 3.3)."""

    def __init__(self, c: ModelConfig, *, num_levels: int):
        super().__init__()
        self.num_heads, self.num_levels, self.dropout = c.num_heads, num_levels, c.dropout
        self.q, self.k, self.v, self.out = (nn.Linear(c.channels, c.channels) for _ in range(4))
        self.offset = nn.Linear(c.channels, num_levels * c.num_heads * 2)
        self.scale = nn.Linear(c.channels, num_levels * c.num_heads * 2)
        self.mix = nn.Linear(c.channels, num_levels) if num_levels > 1 else None
        xavier_(self)
        xavier_fused_([self.q, self.k, self.v])
        xavier_fused_([self.out])
        nn.init.zeros_(self.scale.weight)
        nn.init.ones_(self.scale.bias)

    def forward(self, query: Tensor, guide: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """query [B, Q, C]: what asks; guide [B, Q, C]: what says where; reference [B, Q, 2]: the
        centre in [0, 1] -> update [B, Q, C]."""
        heads = (self.num_levels, self.num_heads, 2)
        offset = self.offset(guide).unflatten(-1, heads)
        scale = self.scale(guide).unflatten(-1, heads)
        q = self.q(query)
        k = self.k(memory.tokens + memory.position)
        v = self.v(memory.tokens)
        attended, start = [], 0
        for level, (height, width) in enumerate(memory.shapes):
            centre = reference * memory.valid_sizes[:, None, level]
            centre = centre[:, :, None] + offset[:, :, level]
            prior = gaussian(centre, scale[:, :, level], height, width)
            size = height * width
            attended.append(
                attend_densely(
                    q,
                    k.narrow(1, start, size),
                    v.narrow(1, start, size),
                    self.num_heads,
                    memory.padding.narrow(1, start, size),
                    dropout=self.dropout if self.training else 0.0,
                    prior=prior,
                )
            )
            start += size
        if self.mix is None:
            return self.out(attended[0])
        share = self.mix(guide).softmax(-1)
        mixed = sum(part * share[..., i, None] for i, part in enumerate(attended))
        return self.out(mixed)


def gaussian(centre: Tensor, scale: Tensor, height: int, width: int) -> Tensor:
    """Logarithm of a Gaussian over the cells of a map, [B, heads, Q, height * width].

    centre [B, Q, heads, 2] in cells, a cell's own coordinate being its index; scale [B, Q, heads,
    2]: inverse widths.
    """
    x, y = (
        torch.arange(size, device=centre.device, dtype=centre.dtype) for size in (width, height)
    )
    scale = scale.to(centre.dtype)
    along_x = ((centre[..., :1] - x) * scale[..., :1]) ** 2
    along_y = ((centre[..., 1:] - y) * scale[..., 1:]) ** 2
    exponent = along_y[..., :, None] + along_x[..., None, :]
    return (-exponent / SMOOTHNESS).flatten(-2).transpose(1, 2)


class GaussianDecoderLayer(nn.Module):
    """The stock layer, except that where to look is read before self-attention."""

    def __init__(self, c: ModelConfig, *, num_levels: int):
        super().__init__()
        self.guide_norm = nn.LayerNorm(c.channels)
        self.self_attention = SelfAttention(
            channels=c.channels, num_heads=c.num_heads, dropout=c.dropout
        )
        self.cross_attention = GaussianAttention(c, num_levels=num_levels)
        self.dropout = nn.Dropout(c.dropout)
        self.norm = nn.LayerNorm(c.channels)
        self.feed_forward = feed_forward(c)

    def forward(
        self,
        content: Tensor,
        position: tuple[Tensor, Tensor],
        reference: Tensor,
        memory: Memory,
        query_mask: QueryAttentionMask,
    ) -> Tensor:
        for_self, for_cross = position
        guide = self.guide_norm(content + for_self)
        content = self.self_attention(content, for_self, query_mask)
        update = self.cross_attention(content + for_cross, guide, reference, memory)
        return self.feed_forward(self.norm(content + self.dropout(update)))


class GuidedPoint(nn.Module):
    """The centre of a query, as logits: an MLP of normed content and slot. norm: that of the first
    decoder layer, which owns it as well."""

    def __init__(self, *, channels: int, norm: nn.LayerNorm):
        super().__init__()
        self.norm = norm
        self.mlp = MLP(in_dim=channels, hidden_dim=channels, out_dim=2, num_layers=3)
        xavier_(self.mlp)

    def forward(self, content: Tensor, position: Tensor) -> Tensor:
        return self.mlp(self.norm(content + position))


class ScaleEncoder(DenseEncoder):
    """Attention within each scale, in the middle layer across all of them (sec. 3.3)."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__(layers)
        self.across = len(layers) // 2

    def forward(self, memory: Memory) -> Memory:
        sizes = [height * width for height, width in memory.shapes]
        for index, layer in enumerate(self.layers):
            if index == self.across:
                tokens = layer(memory)
            else:
                names = ("tokens", "position", "padding")
                parts = zip(*(getattr(memory, name).split(sizes, 1) for name in names), strict=True)
                scales = [replace(memory, **dict(zip(names, p, strict=True))) for p in parts]
                tokens = torch.cat([layer(scale) for scale in scales], dim=1)
            memory = replace(memory, tokens=tokens)
        return memory


def slots_and_decoder(
    c: BoxConfig, content: QueryContent, *, num_levels: int
) -> tuple[LearnedQueries, Decoder]:
    layers = [GaussianDecoderLayer(c, num_levels=num_levels) for _ in range(c.decoder_layers)]
    point = GuidedPoint(channels=c.channels, norm=layers[0].guide_norm)
    decoder = Decoder(
        layers=layers,
        position=LearnedPosition(),
        predictor=PointOffsetBoxes(
            heads=shared_heads(c), norm=nn.LayerNorm(c.channels), epsilon=c.epsilon
        ),
    )
    return zero_content_queries(c, content, point), decoder


def smca(
    config: BoxConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """SMCA on the last feature."""
    c = config
    design, decoder = slots_and_decoder(c, content, num_levels=1)
    return single_scale_detector(
        c,
        in_channels,
        strides,
        temperature=10000.0,
        encoder=DenseEncoder(dense_encoder_layers(c)),
        query_design=design,
        decoder=decoder,
    )


@dataclass(frozen=True, kw_only=True)
class SMCAMultiScaleConfig(BoxConfig):
    """SMCA on several feature levels."""

    num_levels: int = 4


def smca_multiscale(
    config: SMCAMultiScaleConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """SMCA on several scales (strides 16, 32 and 64 in the paper)."""
    c = config
    design, decoder = slots_and_decoder(c, content, num_levels=c.num_levels)
    return DETR(
        neck=multi_scale_neck(c, in_channels, strides),
        flatten=Flatten(
            position=SinePosition(channels=c.channels, temperature=10000.0, cell_offset=0.0),
            channels=c.channels,
            num_levels=c.num_levels,
        ),
        encoder=ScaleEncoder(dense_encoder_layers(c)),
        query_design=design,
        decoder=decoder,
    )
