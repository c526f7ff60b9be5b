"""Heads and box rules: what a decoder layer's content says, and where the next layer looks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dn_detr.layers.box_ops import at_least_float32, inverse_sigmoid
from dn_detr.layers.mlp import MLP
from dn_detr.models.model_config import BoxConfig, ModelConfig
from dn_detr.structures import LayerOutput


class Heads(nn.Module):
    """Class and box heads of every layer; `shared`: one pair for all layers.

    A class starts at probability 0.01 (1708.02002, sec. 4.1), a box at its base; size_bias: where
    the first head's width and height start, as logits (-2 in the code of 2010.04159).
    """

    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        num_layers: int,
        shared: bool,
        size_bias: float = 0.0,
    ):
        super().__init__()
        count = 1 if shared else num_layers
        self.class_heads = nn.ModuleList(class_head(channels, num_classes) for _ in range(count))
        self.box_heads = nn.ModuleList(box_head(channels) for _ in range(count))
        bias = self.box_heads[0].layers[-1].bias  # type: ignore[index, union-attr]
        nn.init.constant_(bias[2:], size_bias)

    def classify(self, layer: int, content: Tensor) -> Tensor:
        return at_least_float32(self.class_heads[min(layer, len(self.class_heads) - 1)](content))

    def delta(self, layer: int, content: Tensor) -> Tensor:
        return at_least_float32(self.box_heads[min(layer, len(self.box_heads) - 1)](content))


def shared_heads(config: ModelConfig, size_bias: float = 0.0) -> Heads:
    """One pair of heads for all layers."""
    return Heads(
        channels=config.channels,
        num_classes=config.num_logits,
        num_layers=config.decoder_layers,
        shared=True,
        size_bias=size_bias,
    )


def own_heads(config: ModelConfig, size_bias: float = 0.0) -> Heads:
    """A pair of heads for every layer."""
    return Heads(
        channels=config.channels,
        num_classes=config.num_logits,
        num_layers=config.decoder_layers,
        shared=False,
        size_bias=size_bias,
    )


def class_head(channels: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(channels, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))
    return head


def box_head(channels: int) -> MLP:
    head = MLP(in_dim=channels, hidden_dim=channels, out_dim=4, num_layers=3)
    nn.init.zeros_(head.layers[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(head.layers[-1].bias)  # type: ignore[arg-type]
    return head


def refine_box(reference: Tensor, delta: Tensor, epsilon: float) -> Tensor:
    """The box [..., 4] at logit offset `delta` [..., 4] from a reference [..., 2 or 4].

    A point has no size, so width and height are the offset's alone. float32, whatever autocast says.
    """
    logits = inverse_sigmoid(reference, epsilon)
    delta = delta.to(logits.dtype)
    if reference.shape[-1] == 2:
        return torch.cat((delta[..., :2] + logits, delta[..., 2:]), dim=-1).sigmoid()
    return (delta + logits).sigmoid()


class IterativeRefinement(nn.Module):
    """Boxes move from layer to layer: each is an offset from the last (2010.04159, appendix A.4).

    norm: applied before the heads predict, while the move of the reference uses the un-normed
    content, so that the next reference differs from the predicted box (code of DAB-DETR and DINO);
    None: both are one. looks_forward_twice: the next box is an offset from a moved reference with
    gradient (2203.03605, sec. 3.5). The reference that the next layer attends with never has one.
    """

    def __init__(
        self,
        *,
        heads: Heads,
        norm: nn.Module | None,
        looks_forward_twice: bool,
        epsilon: float,
    ):
        super().__init__()
        self.heads = heads
        self.norm = norm
        self.looks_forward_twice = looks_forward_twice
        self.epsilon = epsilon

    def start(self, _content: Tensor, reference: Tensor) -> LayerOutput:
        """Before the first layer there is a reference, but no prediction yet."""
        return LayerOutput(logits=None, boxes=None, reference=reference, base=reference)

    def forward(self, layer: int, content: Tensor, previous: LayerOutput) -> LayerOutput:
        normed = content if self.norm is None else self.norm(content)
        logits = self.heads.classify(layer, normed)
        boxes = refine_box(previous.base, self.heads.delta(layer, normed), self.epsilon)
        # From the detached reference, so that a loss reaches one layer back and no further.
        moved = boxes
        if self.norm is not None or self.looks_forward_twice:
            moved = refine_box(previous.reference, self.heads.delta(layer, content), self.epsilon)
        reference = moved.detach()
        base = moved if self.looks_forward_twice else reference
        return LayerOutput(logits=logits, boxes=boxes, reference=reference, base=base)


class PointOffsetBoxes(nn.Module):
    """Every layer's box is an offset from the first reference, which never moves (2010.04159,
    sec. 4.1; 2108.06152, sec. 3.3). Gradient reaches it from all layers.

    norm: applied before the heads, or None.
    """

    def __init__(self, *, heads: Heads, norm: nn.Module | None, epsilon: float):
        super().__init__()
        self.heads = heads
        self.norm = norm
        self.epsilon = epsilon

    def start(self, _content: Tensor, reference: Tensor) -> LayerOutput:
        """Before the first layer there is a reference, but no prediction yet."""
        return LayerOutput(logits=None, boxes=None, reference=reference, base=reference)

    def forward(self, layer: int, content: Tensor, previous: LayerOutput) -> LayerOutput:
        content = content if self.norm is None else self.norm(content)
        return LayerOutput(
            logits=self.heads.classify(layer, content),
            boxes=refine_box(previous.base, self.heads.delta(layer, content), self.epsilon),
            reference=previous.reference,
            base=previous.base,
        )


class DirectBoxes(nn.Module):
    """Boxes without any reference, as the heads say them (2005.12872). norm: before the heads."""

    def __init__(self, *, heads: Heads, norm: nn.Module):
        super().__init__()
        self.heads = heads
        self.norm = norm

    def start(self, _content: Tensor, _reference: None) -> LayerOutput:
        """Before the first layer there is no prediction, and never a reference."""
        return LayerOutput(logits=None, boxes=None, reference=None, base=None)

    def forward(self, layer: int, content: Tensor, _previous: LayerOutput) -> LayerOutput:
        content = self.norm(content)
        return LayerOutput(
            logits=self.heads.classify(layer, content),
            boxes=self.heads.delta(layer, content).sigmoid(),
            reference=None,
            base=None,
        )


def normed_iterative_refinement(config: BoxConfig) -> IterativeRefinement:
    """The box rule of DAB-DETR and DINO: shared heads behind a norm, looking forward twice."""
    return IterativeRefinement(
        heads=shared_heads(config),
        norm=nn.LayerNorm(config.channels),
        looks_forward_twice=True,
        epsilon=config.epsilon,
    )
