"""The decoder loop: attend, predict, move the reference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.layers.attend import Visibility, attention_dtype
from dn_detr.layers.attention import SelfAttention
from dn_detr.layers.mlp import MLP, FeedForward
from dn_detr.layers.position import sine_of_reference
from dn_detr.structures import Memory, Predictions, Queries


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward, each with its residual and norm after it.

    cross_attention: (content, position, reference, memory) -> update [B, Q, C].
    """

    def __init__(
        self,
        *,
        self_attention: SelfAttention,
        cross_attention: nn.Module,
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
        visibility: Visibility,
    ) -> Tensor:
        for_self, for_cross = position
        content = self.self_attention(content, for_self, visibility)
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


class BoxPosition(nn.Module):
    """Query position from the reference box: MLP(sine(box)) (2201.12329, sec. 4.2). One vector for
    self- and cross-attention.

    scales_with_content: from the second layer on it is scaled by an MLP of the content (sec. 4.3).
    scales_with_canvas: the box is first scaled by the share of the finest map that is not padding,
    as the published code of DAB-Deformable-DETR and DINO does; positions then depend on how much
    padding the other images of the batch cause. Needed only where their weights are loaded.
    """

    def __init__(self, *, channels: int, scales_with_content: bool, scales_with_canvas: bool):
        super().__init__()
        self.channels = channels
        self.scales_with_canvas = scales_with_canvas
        self.of_box = MLP(in_dim=2 * channels, hidden_dim=channels, out_dim=channels, num_layers=2)
        self.scale = None
        if scales_with_content:
            self.scale = MLP(in_dim=channels, hidden_dim=channels, out_dim=channels, num_layers=2)

    def forward(
        self, layer: int, content: Tensor, reference: Tensor, learned: None, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        if self.scales_with_canvas:
            height, width = memory.shapes[0]
            valid_width, valid_height = memory.valid_sizes[:, 0].unbind(-1)
            ratio = torch.stack((valid_width / width, valid_height / height), dim=-1)
            reference = reference * ratio.repeat(1, 2)[:, None]
        encoded = sine_of_reference(reference, self.channels // 2)
        position = self.of_box(encoded.to(content.dtype))
        if layer > 0 and self.scale is not None:
            position = position * self.scale(content)
        return position, position


class LearnedPosition(nn.Module):
    """Query position is the learned vector, in every layer, for self- and cross-attention."""

    def forward(
        self, layer: int, content: Tensor, reference: Tensor, learned: Tensor, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        return learned, learned


class Decoder(nn.Module):
    """Queries and memory to predictions of every layer.

    position: (layer, content, reference, learned position, memory) -> (for self-, for
    cross-attention); predictor: (layer, content, Step) -> Step, with `start(content, reference)`.
    """

    def __init__(self, *, layers: list[nn.Module], position: nn.Module, predictor: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.position = position
        self.predictor = predictor

    def forward(self, queries: Queries, memory: Memory) -> Predictions:
        content, learned = queries.state.content, queries.state.position
        visibility = Visibility(
            queries.segments,
            device=content.device,
            dtype=attention_dtype(content),
            mask=queries.mask,
        )
        step = self.predictor.start(content, queries.state.reference)
        steps, references = [], []
        for index, layer in enumerate(self.layers):
            references.append(None if step.reference is None else step.reference.detach())
            position = self.position(index, content, step.reference, learned, memory)
            content = layer(content, position, step.reference, memory, visibility)
            step = self.predictor(index, content, step)
            steps.append(step)
        return Predictions(
            logits=torch.stack([step.logits for step in steps]),
            boxes=torch.stack([step.boxes for step in steps]),
            references=tuple(references),
            segments=queries.segments,
            proposals=queries.proposals,
        )

