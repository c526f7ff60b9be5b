"""Queries that are learned slots: each has a vector of its own, from which its point follows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.layers.box_ops import at_least_float32
from dn_detr.layers.query_content import QueryContent
from dn_detr.models.model_config import BoxConfig
from dn_detr.structures import Memory, Queries, QueryState, Segment


class LearnedQueryParameters(nn.Module):
    """Learned rows of N queries: position [N, C], and content [N, C] or None."""

    def __init__(self, *, position: nn.Parameter, content: nn.Parameter | None):
        super().__init__()
        self.position = position
        self.content = content


class LearnedQueries(nn.Module):
    """A learned position for each query, and the reference point that follows from it, if any.

    has_rows: content is learned as well; otherwise it starts from zero (2005.12872). point:
    (content, position) -> logits [..., 2] of the point; None: there is no reference.

    A box that an auxiliary query module brings gets a linear embedding of its four coordinates as position
    (2203.01305, on vanilla DETR), which exists only with labels, and its centre, clamped to
    [epsilon, 1 - epsilon], as point.
    """

    starts_from_masks = False

    def __init__(
        self,
        *,
        content: QueryContent,
        num_queries: int,
        has_rows: bool,
        point: nn.Module | None,
        epsilon: float,
    ):
        super().__init__()
        self.content = content
        self.has_rows = has_rows
        self.point = point
        self.epsilon = epsilon
        self.box_embedding = nn.Linear(4, content.channels) if content.has_labels else None
        self.learned = self.new_parameters(num_queries)

    def new_parameters(
        self,
        num_queries: int,
        own_head: bool = True,  # noqa: ARG002 - other designs use it
    ) -> LearnedQueryParameters:
        """Rows for further queries, owned by whoever asks; there are no proposals to head."""
        return LearnedQueryParameters(
            position=nn.Parameter(torch.randn(num_queries, self.content.channels)),
            content=self.content.new_rows(num_queries) if self.has_rows else None,
        )

    def bind(self, memory: Memory) -> LearnedQuerySource:
        """A source of queries for this memory; it lives for one forward."""
        return LearnedQuerySource(self, memory)


def zero_content_queries(
    config: BoxConfig, content: QueryContent, point: nn.Module | None
) -> LearnedQueries:
    """Slots whose content starts from zero."""
    return LearnedQueries(
        content=content,
        num_queries=config.num_queries,
        has_rows=False,
        point=point,
        epsilon=config.epsilon,
    )


class LearnedQuerySource:
    """The queries of one forward of `LearnedQueries`."""

    def __init__(self, design: LearnedQueries, memory: Memory):
        self.design = design
        self.batch = memory.tokens.shape[0]

    def queries(
        self,
        learned: LearnedQueryParameters | None = None,
        first_rank: int = 0,  # noqa: ARG002 - other designs use it
    ) -> Queries:
        """One "match" segment of the rows of `learned` (default: the design's own)."""
        design = self.design
        learned = design.learned if learned is None else learned
        position = learned.position
        if learned.content is None:
            content = torch.zeros_like(position)
        else:
            content = design.content.matched(learned.content)
        reference = None
        if design.point is not None:
            reference = at_least_float32(design.point(content, position)).sigmoid()
            reference = reference.expand(self.batch, -1, -1)
        state = QueryState(
            content=content.expand(self.batch, -1, -1),
            position=position.expand(self.batch, -1, -1),
            reference=reference,
        )
        return Queries(state, (Segment("match", content.shape[0]),))

    def from_boxes(self, labels: Tensor, boxes: Tensor) -> QueryState:
        """Queries of labels [B, T] at boxes [B, T, 4]."""
        design = self.design
        content = design.content.labels(labels)
        centre = boxes[..., :2].clamp(design.epsilon, 1 - design.epsilon)
        return QueryState(
            content=content,
            position=design.box_embedding(boxes.to(content.dtype)),
            reference=None if design.point is None else centre,
        )
