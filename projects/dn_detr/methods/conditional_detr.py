"""Conditional DETR: decoder layers look at a place that their own content chooses.

Depu Meng et al., "Conditional DETR for Fast Training Convergence", 2108.06152.

What differs from DETR:
 - content and place stay apart in decoder attention: added in self-attention after projections of
   their own, concatenated in every head of cross-attention;
 - a query is a learned slot, from which its reference point follows; the point never moves, and all
   boxes are offsets from it;
 - cross-attention compares the sines of the point, scaled by an MLP of the content (from the second
   layer on), with those of the tokens;
 - focal loss with as many queries as boxes may be (300).

Denoising (not in the paper): the noised centre is the point, a linear embedding of the noised box
takes the place of the learned slot, the label is the content.

As in the authors' code, one head and one norm before it serve all layers.
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


class SlotPoint(nn.Module):
    """The reference point of a slot, as logits: an MLP of its position alone (sec. 3.3)."""

    def __init__(self, *, channels: int):
        super().__init__()
        self.query_mlp = MLP(in_dim=channels, hidden_dim=channels, out_dim=2, num_layers=2)
        xavier_(self)

    def forward(self, _content: Tensor, position: Tensor) -> Tensor:
        return self.query_mlp(position)


class ConditionalPointPosition(nn.Module):
    """The spatial query: sines of the point times an MLP of the content (sec. 3.3)."""

    def __init__(self, *, channels: int):
        super().__init__()
        self.channels = channels
        self.scale = MLP(in_dim=channels, hidden_dim=channels, out_dim=channels, num_layers=2)
        xavier_(self)

    def forward(
        self, layer: int, content: Tensor, reference: Tensor, learned: Tensor, _memory: Memory
    ) -> tuple[Tensor, ConditionalPosition]:
        spatial = sine_of_reference(reference, self.channels // 2).to(content.dtype)
        if layer > 0:
            spatial = spatial * self.scale(content)
        return learned, ConditionalPosition(spatial=spatial, learned=learned)


def conditional_detr(
    config: BoxConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Neck, encoder, queries and decoder of Conditional DETR."""
    c = config
    return single_scale_detector(
        c,
        in_channels,
        strides,
        temperature=10000.0,
        encoder=DenseEncoder(dense_encoder_layers(c)),
        query_design=zero_content_queries(c, content, SlotPoint(channels=c.channels)),
        decoder=Decoder(
            layers=conditional_decoder_layers(c),
            position=ConditionalPointPosition(channels=c.channels),
            predictor=PointOffsetBoxes(
                heads=shared_heads(c), norm=nn.LayerNorm(c.channels), epsilon=c.epsilon
            ),
        ),
    )
