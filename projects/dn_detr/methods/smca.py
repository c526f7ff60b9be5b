"""SMCA: cross-attention modulated by a Gaussian whose centre and scale the query predicts.

Peng Gao et al., "Fast Convergence of DETR with Spatially Modulated Co-Attention", 2101.07448;
single and multi-scale.

What differs from DETR:
 - before self-attention, a layer predicts from content and position, for each head, an offset from
   the query centre and separate horizontal and vertical scales; the logarithm of that Gaussian is
   added to the cross-attention logits;
 - the centre is predicted once, before the first layer; all boxes are offsets from it;
 - focal loss with 300 queries;
 - multi-scale (`smca_multiscale`): the encoder attends within each scale, and across all scales in
   its middle layer; the decoder attends to each scale separately and weights them per query.

Denoising (not in the paper): the noised centre is the centre, the position a linear embedding of
the noised box, the content the label embedding.

Deviations from the paper, as in the authors' code: the scale of the Gaussian is an inverse width
(the squared distance is multiplied by its square), and the centre comes from a three-layer MLP.
Deviations from the code: centres and offsets are in cells of the feature map, at integer
coordinates; theirs assumes a stride of 32 pixels. The multi-scale model follows the paper; the code
released under this name is a different network, whose encoder uses depthwise convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dn_detr.layers.initialization import default_, xavier_, xavier_fused_
from dn_detr.layers.mlp import MLP
from dn_detr.layers.multihead_attention import SelfAttention, attend_densely
from dn_detr.layers.position_encoding import SinePosition
from dn_detr.layers.query_attention import QueryAttentionMask
from dn_detr.layers.query_content import QueryContent
from dn_detr.models.decoder import Decoder
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.encoder import DenseEncoder
from dn_detr.models.learned_queries import LearnedQueries, zero_content_queries
from dn_detr.models.model_config import BoxConfig, LevelsConfig, ModelConfig
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
    """Cross-attention with a Gaussian prior for each head and level (sec. 3.2 and 3.3)."""

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
        """Attend from query [B, Q, C] to memory -> update [B, Q, C].

        Args:
            guide: [B, Q, C], predicts offsets, scales and level weights.
            reference: centres [B, Q, 2] in [0, 1].
        """
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
    """Compute the logarithm of a Gaussian over a map, [B, heads, Q, height * width].

    Args:
        centre: [B, Q, heads, 2], x and y in cells; the coordinate of a cell is its index.
        scale: [B, Q, heads, 2], inverse widths.
        height, width: of the map in cells.
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
    """`DecoderLayer` with Gaussian cross-attention, guided by the content before self-attention."""

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
        """Update content [B, Q, C]; position: [B, Q, C] for self- and for cross-attention."""
        for_self, for_cross = position
        guide = self.guide_norm(content + for_self)
        content = self.self_attention(content, for_self, query_mask)
        update = self.cross_attention(content + for_cross, guide, reference, memory)
        return self.feed_forward(self.norm(content + self.dropout(update)))


class GuidedPoint(nn.Module):
    """Predict the centre of a query by an MLP of its normalised content and position.

    Args:
        norm: shared with the first decoder layer.
    """

    def __init__(self, *, channels: int, norm: nn.LayerNorm):
        super().__init__()
        self.norm = norm
        self.mlp = MLP(in_dim=channels, hidden_dim=channels, out_dim=2, num_layers=3)
        xavier_(self.mlp)

    def forward(self, content: Tensor, position: Tensor) -> Tensor:
        """Map content and position [..., C] to point logits [..., 2]."""
        return self.mlp(self.norm(content + position))


class ScaleEncoder(DenseEncoder):
    """Self-attention within each scale, and across all scales in the middle layer (sec. 3.3)."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__(layers)
        self.across = len(layers) // 2

    def forward(self, memory: Memory) -> Memory:
        """Encode the tokens [B, S, C] of the memory."""
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


def queries_and_decoder(
    c: BoxConfig, content: QueryContent, *, num_levels: int
) -> tuple[LearnedQueries, Decoder]:
    """Build both together: the centre of a query uses a norm of the first decoder layer."""
    layers = [GaussianDecoderLayer(c, num_levels=num_levels) for _ in range(c.decoder_layers)]
    point = GuidedPoint(channels=c.channels, norm=layers[0].guide_norm)
    heads = shared_heads(c)
    default_(heads.box_heads)  # not zero at the start, as in the authors' code
    decoder = Decoder(
        layers=layers,
        position=LearnedPosition(),
        predictor=PointOffsetBoxes(heads=heads, norm=nn.LayerNorm(c.channels), epsilon=c.epsilon),
    )
    return zero_content_queries(c, content, point), decoder


def smca(
    config: BoxConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Build single-scale SMCA on the last backbone feature."""
    c = config
    design, decoder = queries_and_decoder(c, content, num_levels=1)
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
class SMCAMultiScaleConfig(BoxConfig, LevelsConfig):
    """SMCA on several feature levels."""


def smca_multiscale(
    config: SMCAMultiScaleConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Build multi-scale SMCA (strides 16, 32 and 64 in the paper)."""
    c = config
    design, decoder = queries_and_decoder(c, content, num_levels=c.num_levels)
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
