"""Transformer decoder with a prediction and a reference update after each layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dn_detr.layers.mlp import FeedForward
from dn_detr.layers.query_attention import QueryAttentionMask, attention_dtype
from dn_detr.protocols import CrossAttention, Predictor, QueryPosition
from dn_detr.structures import Memory, Predictions, Queries


class DecoderLayer(nn.Module):
    """Post-norm decoder layer: self-attention, cross-attention and feed-forward.

    Args:
        cross_attention: (content, position, reference, memory) -> update [B, Q, C].
    """

    def __init__(
        self,
        *,
        self_attention: nn.Module,
        cross_attention: CrossAttention,
        feed_forward: FeedForward,
        channels: int,
        dropout: float,
    ):
        super().__init__()
        self.self_attention = self_attention
        self.cross_attention = cross_attention
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(channels)
        self.feed_forward = feed_forward

    def forward(
        self,
        content: Tensor,
        position: tuple[Tensor, Tensor],
        reference: Tensor,
        memory: Memory,
        query_mask: QueryAttentionMask,
    ) -> Tensor:
        """Return the updated content [B, Q, C].

        content [B, Q, C]; position: for self- and for cross-attention, [B, Q, C] each (or the type
        of the cross-attention); reference [B, Q, R] in [0, 1] or None.
        """
        for_self, for_cross = position
        content = self.self_attention(content, for_self, query_mask)
        update = self.cross_attention(content, for_cross, reference, memory)
        return self.feed_forward(self.norm(content + self.dropout(update)))


class DeformableCrossAttention(nn.Module):
    """Deformable cross-attention around the references (2010.04159, sec. 4.1)."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(
        self, content: Tensor, position: Tensor, reference: Tensor, memory: Memory
    ) -> Tensor:
        """Return the update [B, Q, C]; content and position [B, Q, C], reference [B, Q, 2 or 4]."""
        return self.attention(content + position, reference, memory)


class Decoder(nn.Module):
    """Decoder that predicts after every layer.

    Args:
        position: Query positions, see `models.query_positions`.
        predictor: Prediction heads and reference update, see `models.prediction_heads`.
    """

    def __init__(
        self, *, layers: Sequence[nn.Module], position: QueryPosition, predictor: Predictor
    ):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.position = position
        self.predictor = predictor

    def forward(self, queries: Queries, memory: Memory) -> Predictions:
        """Return the predictions of all layers, preceded by those of `predictor.start`, if any."""
        content, learned = queries.state.content, queries.state.position
        query_mask = QueryAttentionMask(
            queries.segments,
            device=content.device,
            dtype=attention_dtype(content),
            mask=queries.mask,
        )
        output = self.predictor.start(content, queries.state.reference)
        outputs, references = [], []
        if output.logits is not None:
            references.append(output.reference.detach())
            outputs.append(output)
        for index, layer in enumerate(self.layers):
            references.append(None if output.reference is None else output.reference.detach())
            position = self.position(index, content, output.reference, learned, memory)
            content = layer(content, position, output.reference, memory, query_mask)
            output = self.predictor(index, content, output)
            outputs.append(output)
        return Predictions(
            logits=torch.stack([output.logits for output in outputs]),
            boxes=torch.stack([output.boxes for output in outputs]),
            references=tuple(references),
            segments=queries.segments,
            proposals=queries.proposals,
            mask_embeddings=None
            if output.mask_embeddings is None
            else torch.stack([output.mask_embeddings for output in outputs]),
            mask_features=memory.mask_features,
        )
