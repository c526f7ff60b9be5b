"""Interfaces between the parts of a model, so that each can be replaced and a type checker sees it.

Every nn.Module here is called like a function; parameters belong to the module that declares them.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from dn_detr.layers.query_content import QueryContent
from dn_detr.structures import LayerOutput, Matched, Memory, Queries, QueryState, Targets


class QuerySource(Protocol):
    """The queries of one forward pass: a query design bound to a memory."""

    def queries(self, learned: Any = None, first_rank: int = 0) -> Queries:
        """Make one "match" segment.

        Args:
            learned: parameters of `QueryDesign.new_parameters`; None: the design's own.
            first_rank: rank of the first proposal taken, in two-stage designs.
        """

    def from_boxes(self, labels: Tensor, boxes: Tensor) -> QueryState:
        """Make queries of labels [B, T] int64 at boxes [B, T, 4] (cxcywh in [0, 1])."""


class MaskQuerySource(Protocol):
    """The source of a design whose queries start from masks."""

    def queries(self, learned: Any = None, first_rank: int = 0) -> Queries:
        """See `QuerySource`."""

    def from_masks(
        self, labels: Tensor, masks: tuple[Tensor, ...], object_of: Tensor, shift: Tensor
    ) -> QueryState:
        """Make queries of labels [B, T] at the masks (`Targets.masks`) of objects object_of [B, T],
        shifted by shift [B, T, 2] in fractions of the image.
        """


class QueryDesign(Protocol):
    """Where the decoder's queries come from, and how a box becomes a query; an nn.Module."""

    content: QueryContent
    starts_from_masks: bool

    @property
    def learned(self) -> nn.Module:
        """The parameters of the matched queries."""

    def new_parameters(self, num_queries: int, own_head: bool = True) -> nn.Module:
        """Make the parameters of extra queries, owned by the caller.

        Args:
            num_queries: N.
            own_head: in two-stage designs, whether these queries select among proposals of their
                own head; otherwise they continue the ranking of the first selection.
        """

    def bind(self, memory: Memory) -> QuerySource | MaskQuerySource:
        """Bind to the memory of one forward pass."""


class QueryPosition(Protocol):
    """Positional queries of a decoder layer; an nn.Module."""

    def __call__(
        self,
        layer: int,
        content: Tensor,
        reference: Tensor | None,
        learned: Tensor | None,
        memory: Memory,
    ) -> tuple[Any, Any]:
        """Return (for self-attention, for cross-attention), [B, Q, C] each as a rule.

        Args:
            content: [B, Q, C]; reference: [B, Q, R]; learned: [B, Q, C], `QueryState.position`.
        """


class CrossAttention(Protocol):
    """Cross-attention of a decoder layer; an nn.Module."""

    def __call__(
        self, content: Tensor, position: Any, reference: Tensor | None, memory: Memory
    ) -> Tensor:
        """Return the update [B, Q, C] of content [B, Q, C]; position: of `QueryPosition`."""


class Predictor(Protocol):
    """Prediction heads and the rule that updates the reference; an nn.Module."""

    def start(self, content: Tensor, reference: Any) -> LayerOutput:
        """Return the state before the first layer, from content [B, Q, C] and reference [B, Q, R].

        It may already predict.
        """

    def __call__(self, layer: int, content: Tensor, previous: LayerOutput) -> LayerOutput:
        """Predict from content [B, Q, C] after a layer, given the previous layer's output."""


class AuxiliaryQueries(Protocol):
    """Queries that exist only in training; an nn.Module.

    hides_labels: whether they train the label embedding "unknown".
    """

    hides_labels: bool

    def __call__(self, queries: Queries, source: QuerySource, targets: Targets) -> Queries:
        """Return `queries` with segments added."""


class LossTerm(Protocol):
    """One term of the loss."""

    def __call__(self, matched: Matched, num_objects: float | Tensor) -> Tensor:
        """Return the loss of each layer and segment, [L, n]."""
