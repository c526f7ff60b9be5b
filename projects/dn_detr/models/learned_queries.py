"""Query designs with a learned position embedding per query."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.layers.box_ops import at_least_float32, keep_inside
from dn_detr.layers.query_content import QueryContent
from dn_detr.models.model_config import BoxConfig
from dn_detr.structures import Memory, Queries, QueryState, Segment


class LearnedQueryParameters(nn.Module):
    """Parameters of N learned queries: position [N, C], and content [N, C] or None."""

    def __init__(self, *, position: nn.Parameter, content: nn.Parameter | None):
        super().__init__()
        self.position = position
        self.content = content


class LearnedQueries(nn.Module):
    """Learned position embeddings, optionally with a reference point predicted from them.

    The position of a given box is a linear embedding of its coordinates (2203.01305, on vanilla
    DETR), which exists only with labels; its reference point is the box centre.

    Args:
        has_rows: Learn the content; else it is zero (2005.12872).
        point: (content, position) -> logits [..., 2] of the reference point, or None for queries
            without reference.
        epsilon: Of `keep_inside`, for the centres of given boxes.
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

    def new_parameters(self, num_queries: int, own_head: bool = True) -> LearnedQueryParameters:
        """Create the parameters of `num_queries` extra queries (no proposal head here)."""
        return LearnedQueryParameters(
            position=nn.Parameter(torch.randn(num_queries, self.content.channels)),
            content=self.content.new_rows(num_queries) if self.has_rows else None,
        )

    def bind(self, memory: Memory) -> LearnedQuerySource:
        """Create the source of queries of one forward."""
        return LearnedQuerySource(self, memory)


def zero_content_queries(
    config: BoxConfig, content: QueryContent, point: nn.Module | None
) -> LearnedQueries:
    """Build learned queries with zero content (2005.12872)."""
    return LearnedQueries(
        content=content,
        num_queries=config.num_queries,
        has_rows=False,
        point=point,
        epsilon=config.epsilon,
    )


class LearnedQuerySource:
    """Queries of one forward of `LearnedQueries`."""

    def __init__(self, design: LearnedQueries, memory: Memory):
        self.design = design
        self.batch = memory.tokens.shape[0]

    def queries(
        self,
        learned: LearnedQueryParameters | None = None,
        first_rank: int = 0,
    ) -> Queries:
        """Return one "match" segment from `learned` (default: the design's own parameters)."""
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
        """Return queries for labels [B, T] int64 and boxes [B, T, 4]."""
        design = self.design
        content = design.content.labels(labels)
        centre = keep_inside(boxes[..., :2], design.epsilon)
        return QueryState(
            content=content,
            position=design.box_embedding(boxes.to(content.dtype)),
            reference=None if design.point is None else centre,
        )
