"""Prediction heads and reference updates.

Protocol of a predictor (`models.decoder.Decoder`), R = 2 (points) or 4 (boxes):

    start(content [B, Q, C], reference [B, Q, R] or None) -> LayerOutput before the first layer,
        without logits if nothing is predicted yet
    forward(layer index, content [B, Q, C], previous LayerOutput) -> LayerOutput with logits
        [B, Q, K], boxes [B, Q, 4] and the reference of the next layer
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dn_detr.layers.box_ops import at_least_float32, inverse_sigmoid
from dn_detr.layers.initialization import copies
from dn_detr.layers.mlp import MLP
from dn_detr.models.model_config import BoxConfig, ModelConfig
from dn_detr.structures import LayerOutput


class Heads(nn.Module):
    """Class and box heads of all layers.

    Initially, classes have probability 0.01 (1708.02002, sec. 4.1), box deltas are 0 and the heads
    of all layers are equal.

    Args:
        shared: Use one pair of heads for all layers.
        size_bias: Initial width and height logits of the first box head (-2 in the code of
            2010.04159).
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
        self.class_heads = nn.ModuleList(copies(lambda: class_head(channels, num_classes), count))
        self.box_heads = nn.ModuleList(copies(lambda: box_head(channels), count))
        bias = self.box_heads[0].layers[-1].bias  # type: ignore[index, union-attr]
        nn.init.constant_(bias[2:], size_bias)

    def classify(self, layer: int, content: Tensor) -> Tensor:
        """Return class logits [B, Q, K], at least float32, from content [B, Q, C]."""
        return at_least_float32(self.class_heads[min(layer, len(self.class_heads) - 1)](content))

    def delta(self, layer: int, content: Tensor) -> Tensor:
        """Return box deltas [B, Q, 4] in logit space, at least float32, from content [B, Q, C]."""
        return at_least_float32(self.box_heads[min(layer, len(self.box_heads) - 1)](content))


def shared_heads(config: ModelConfig, size_bias: float = 0.0) -> Heads:
    """Build one pair of heads for all layers."""
    return Heads(
        channels=config.channels,
        num_classes=config.num_logits,
        num_layers=config.decoder_layers,
        shared=True,
        size_bias=size_bias,
    )


def own_heads(config: ModelConfig, size_bias: float = 0.0) -> Heads:
    """Build a pair of heads per layer."""
    return Heads(
        channels=config.channels,
        num_classes=config.num_logits,
        num_layers=config.decoder_layers,
        shared=False,
        size_bias=size_bias,
    )


def class_head(channels: int, num_classes: int) -> nn.Linear:
    """Build a class head [..., C] -> [..., K] with prior probability 0.01."""
    head = nn.Linear(channels, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))
    return head


def box_head(channels: int) -> MLP:
    """Build a box head [..., C] -> [..., 4] whose output is initially 0."""
    head = MLP(in_dim=channels, hidden_dim=channels, out_dim=4, num_layers=3)
    nn.init.zeros_(head.layers[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(head.layers[-1].bias)  # type: ignore[arg-type]
    return head


def refine_box(reference: Tensor, delta: Tensor, epsilon: float) -> Tensor:
    """Add delta [..., 4] to a reference [..., 2 or 4] in logit space: boxes [..., 4] in [0, 1].

    For points, width and height come from delta alone. Computed in at least float32.
    """
    logits = inverse_sigmoid(reference, epsilon)
    delta = delta.to(logits.dtype)
    if reference.shape[-1] == 2:
        return torch.cat((delta[..., :2] + logits, delta[..., 2:]), dim=-1).sigmoid()
    return (delta + logits).sigmoid()


class IterativeRefinement(nn.Module):
    """Iterative box refinement: each layer refines the last box (2010.04159, appendix A.4).

    The reference used in attention is always detached.

    Args:
        norm: Applied before the heads. The reference is updated from the content without the norm,
            so it differs from the predicted box (code of DAB-DETR and DINO). None: they are equal.
        looks_forward_twice: Let gradients of the next layer's box flow through the updated
            reference (2203.03605, sec. 3.5).
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

    def start(self, content: Tensor, reference: Tensor) -> LayerOutput:
        """Return the initial reference [B, Q, 2 or 4] without a prediction."""
        return LayerOutput(logits=None, boxes=None, reference=reference, base=reference)

    def forward(self, layer: int, content: Tensor, previous: LayerOutput) -> LayerOutput:
        """Predict from content [B, Q, C] and refine `previous.base` [B, Q, 2 or 4]."""
        normed = content if self.norm is None else self.norm(content)
        logits = self.heads.classify(layer, normed)
        boxes = refine_box(previous.base, self.heads.delta(layer, normed), self.epsilon)
        # Refine the detached reference, so that a loss reaches back one layer only.
        refined = boxes
        if self.norm is not None or self.looks_forward_twice:
            refined = refine_box(previous.reference, self.heads.delta(layer, content), self.epsilon)
        reference = refined.detach()
        base = refined if self.looks_forward_twice else reference
        return LayerOutput(logits=logits, boxes=boxes, reference=reference, base=base)


class PointOffsetBoxes(nn.Module):
    """Boxes relative to the initial reference in all layers, without refinement.

    Gradients of all layers reach the reference (2010.04159, sec. 4.1; 2108.06152, sec. 3.3). The
    norm, if any, precedes the heads.
    """

    def __init__(self, *, heads: Heads, norm: nn.Module | None, epsilon: float):
        super().__init__()
        self.heads = heads
        self.norm = norm
        self.epsilon = epsilon

    def start(self, content: Tensor, reference: Tensor) -> LayerOutput:
        """Return the initial reference [B, Q, 2 or 4] without a prediction."""
        return LayerOutput(logits=None, boxes=None, reference=reference, base=reference)

    def forward(self, layer: int, content: Tensor, previous: LayerOutput) -> LayerOutput:
        """Predict from content [B, Q, C], relative to `previous.base` [B, Q, 2 or 4]."""
        content = content if self.norm is None else self.norm(content)
        return LayerOutput(
            logits=self.heads.classify(layer, content),
            boxes=refine_box(previous.base, self.heads.delta(layer, content), self.epsilon),
            reference=previous.reference,
            base=previous.base,
        )


class DirectBoxes(nn.Module):
    """Boxes regressed directly, without a reference (2005.12872); norm precedes the heads."""

    def __init__(self, *, heads: Heads, norm: nn.Module):
        super().__init__()
        self.heads = heads
        self.norm = norm

    def start(self, content: Tensor, reference: None) -> LayerOutput:
        """Return an empty output for content [B, Q, C]: no prediction and no reference."""
        return LayerOutput(logits=None, boxes=None, reference=None, base=None)

    def forward(self, layer: int, content: Tensor, previous: LayerOutput) -> LayerOutput:
        """Predict logits [B, Q, K] and boxes [B, Q, 4] from content [B, Q, C]."""
        content = self.norm(content)
        return LayerOutput(
            logits=self.heads.classify(layer, content),
            boxes=self.heads.delta(layer, content).sigmoid(),
            reference=None,
            base=None,
        )


def normed_iterative_refinement(config: BoxConfig) -> IterativeRefinement:
    """Build the predictor of DAB-DETR and DINO: shared heads after a norm, look forward twice."""
    return IterativeRefinement(
        heads=shared_heads(config),
        norm=nn.LayerNorm(config.channels),
        looks_forward_twice=True,
        epsilon=config.epsilon,
    )
