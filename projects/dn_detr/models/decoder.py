"""The decoder loop: attend, predict, move the reference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.layers.attention_blocks import SelfAttention
from dn_detr.layers.mlp import FeedForward
from dn_detr.layers.query_attention import QueryAttentionMask, attention_dtype
from dn_detr.protocols import CrossAttention, Predictor, QueryPosition
from dn_detr.structures import Memory, Predictions, Queries


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward, each with its residual and norm after it.

    cross_attention: (content, position, reference, memory) -> update [B, Q, C].
    """

    def __init__(
        self,
        *,
        self_attention: SelfAttention,
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
        for_self, for_cross = position
        content = self.self_attention(content, for_self, query_mask)
        update = self.cross_attention(content, for_cross, reference, memory)
        return self.feed_forward(self.norm(content + self.dropout(update)))


class DeformableCrossAttention(nn.Module):
    """Cross-attention of the stock layer by deformable sampling around the reference."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(
        self, content: Tensor, position: Tensor, reference: Tensor, memory: Memory
    ) -> Tensor:
        return self.attention(content + position, reference, memory)


class Decoder(nn.Module):
    """Queries and memory to predictions of every layer.

    position: (layer, content, reference, learned position, memory) -> (for self-, for
    cross-attention); predictor: (layer, content, LayerOutput) -> LayerOutput, with `start(content, reference)`,
    which may predict something before the first layer.
    """

    def __init__(self, *, layers: list[nn.Module], position: QueryPosition, predictor: Predictor):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.position = position
        self.predictor = predictor

    def forward(self, queries: Queries, memory: Memory) -> Predictions:
        content, learned = queries.state.content, queries.state.position
        query_mask = QueryAttentionMask(
            queries.segments,
            device=content.device,
            dtype=attention_dtype(content),
            mask=queries.mask,
        )
        step = self.predictor.start(content, queries.state.reference)  # type: ignore[operator]
        steps, references = [], []
        if step.logits is not None:
            references.append(step.reference.detach())
            steps.append(step)
        for index, layer in enumerate(self.layers):
            references.append(None if step.reference is None else step.reference.detach())
            position = self.position(index, content, step.reference, learned, memory)
            content = layer(content, position, step.reference, memory, query_mask)
            step = self.predictor(index, content, step)
            steps.append(step)
        return Predictions(
            logits=torch.stack([step.logits for step in steps]),
            boxes=torch.stack([step.boxes for step in steps]),
            references=tuple(references),
            segments=queries.segments,
            proposals=queries.proposals,
            mask_embeddings=None
            if step.mask_embeddings is None
            else torch.stack([step.mask_embeddings for step in steps]),
            mask_features=memory.mask_features,
        )
