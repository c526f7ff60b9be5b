"""Conditional DETR: cross-attention with a spatial query conditioned on the decoder content.

Depu Meng et al., "Conditional DETR for Fast Training Convergence", 2108.06152.

What differs from DETR:
 - decoder attention separates content and position: self-attention adds them after separate
   projections, cross-attention concatenates them in every head;
 - the reference point is predicted from the learned position of a query; it is never refined, and
   all layers predict boxes as offsets from it;
 - the spatial query of cross-attention is the sine encoding of the point, scaled from the second
   layer on by an MLP of the content; its keys are the sine encodings of the tokens;
 - focal loss with 300 queries.

Denoising (not in the paper): the reference point is the noised centre, the position a linear
embedding of the noised box, the content the label embedding.

As in the authors' code, all layers share one pair of heads and one norm before them.
"""

from __future__ import annotations

from torch import Tensor, nn

from dn_detr.layers.initialization import xavier_
from dn_detr.layers.mlp import MLP
from dn_detr.layers.multihead_attention import ConditionalPosition
from dn_detr.layers.position_encoding import sine_of_reference
from dn_detr.layers.query_content import QueryContent
from dn_detr.models.decoder import Decoder
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.encoder import DenseEncoder
from dn_detr.models.learned_queries import zero_content_queries
from dn_detr.models.model_config import BoxConfig
from dn_detr.models.prediction_heads import PointOffsetBoxes, shared_heads
from dn_detr.models.single_scale import (
    conditional_decoder_layers,
    dense_encoder_layers,
    single_scale_detector,
)
from dn_detr.structures import Memory


class ReferencePointHead(nn.Module):
    """Predict the reference point of a query from its position by an MLP (sec. 3.3)."""

    def __init__(self, *, channels: int):
        super().__init__()
        self.query_mlp = MLP(in_dim=channels, hidden_dim=channels, out_dim=2, num_layers=2)
        xavier_(self)

    def forward(self, content: Tensor, position: Tensor) -> Tensor:
        """Map position [..., C] to point logits [..., 2]; content is unused."""
        return self.query_mlp(position)


class ConditionalPointPosition(nn.Module):
    """Spatial query: sines of the reference point times an MLP of the content (sec. 3.3)."""

    def __init__(self, *, channels: int):
        super().__init__()
        self.channels = channels
        self.scale = MLP(in_dim=channels, hidden_dim=channels, out_dim=channels, num_layers=2)
        xavier_(self)

    def forward(
        self, layer: int, content: Tensor, reference: Tensor, learned: Tensor, _memory: Memory
    ) -> tuple[Tensor, ConditionalPosition]:
        """Make the positions for self- and cross-attention.

        content and learned are [B, Q, C]; reference is [B, Q, 2] in [0, 1].
        """
        spatial = sine_of_reference(reference, self.channels // 2).to(content.dtype)
        if layer > 0:
            spatial = spatial * self.scale(content)
        return learned, ConditionalPosition(spatial=spatial, learned=learned)


def conditional_detr(
    config: BoxConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Build Conditional DETR."""
    c = config
    return single_scale_detector(
        c,
        in_channels,
        strides,
        temperature=10000.0,
        encoder=DenseEncoder(dense_encoder_layers(c)),
        query_design=zero_content_queries(c, content, ReferencePointHead(channels=c.channels)),
        decoder=Decoder(
            layers=conditional_decoder_layers(c),
            position=ConditionalPointPosition(channels=c.channels),
            predictor=PointOffsetBoxes(
                heads=shared_heads(c), norm=nn.LayerNorm(c.channels), epsilon=c.epsilon
            ),
        ),
    )
