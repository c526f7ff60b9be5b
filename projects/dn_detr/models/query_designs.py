"""Query designs: they create the decoder's queries, also from given boxes.

    design.learned                                parameters of the matched queries
    design.new_parameters(num_queries, own_head)  parameters of extra queries (auxiliary queries)
    design.bind(memory) -> source                 one source per forward
    source.queries(learned, first_rank)           -> Queries with one "match" segment
    source.from_boxes(labels [B, T] int64, boxes [B, T, 4]) -> QueryState of T queries

`own_head` and `first_rank` matter only for two-stage queries (`models.proposals`): extra queries
either have their own proposal head, or take the proposals from rank `first_rank` on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.layers.box_ops import keep_inside
from dn_detr.layers.query_content import QueryContent, SharedContent
from dn_detr.models.model_config import SharedContentConfig
from dn_detr.structures import Memory, Queries, QueryState, Segment


class BoxQueryParameters(nn.Module):
    """Parameters of N queries: content [N, C] and box_logits [N, 4] (2201.12329, sec. 4)."""

    def __init__(self, *, content: nn.Parameter):
        super().__init__()
        self.content = content
        self.box_logits = nn.Parameter(torch.randn(content.shape[0], 4))


class BoxQueries(nn.Module):
    """Learned content and a learned box per query; the box is the reference.

    Given boxes go through `keep_inside`, so that their logits are finite.
    """

    starts_from_masks = False

    def __init__(self, *, content: QueryContent, num_queries: int, epsilon: float):
        super().__init__()
        self.content = content
        self.epsilon = epsilon
        self.learned = self.new_parameters(num_queries)

    def new_parameters(self, num_queries: int, own_head: bool = True) -> BoxQueryParameters:
        """Create the parameters of `num_queries` extra queries (no proposal head here)."""
        return BoxQueryParameters(content=self.content.new_rows(num_queries))

    def bind(self, memory: Memory) -> BoxQuerySource:
        """Create the source of queries of one forward."""
        return BoxQuerySource(self, memory)


class BoxQuerySource:
    """Queries of one forward of `BoxQueries`."""

    def __init__(self, design: BoxQueries, memory: Memory):
        self.design = design
        self.batch = memory.tokens.shape[0]

    def queries(self, learned: BoxQueryParameters | None = None, first_rank: int = 0) -> Queries:
        """Return one "match" segment from `learned` (default: the design's own parameters)."""
        learned = self.design.learned if learned is None else learned
        content = self.design.content.matched(learned.content)
        reference = learned.box_logits.sigmoid()
        state = QueryState(
            content=content.expand(self.batch, -1, -1),
            position=None,
            reference=reference.expand(self.batch, -1, -1),
        )
        return Queries(state, (Segment("match", content.shape[0]),))

    def from_boxes(self, labels: Tensor, boxes: Tensor) -> QueryState:
        """Return queries for labels [B, T] int64 and boxes [B, T, 4]."""
        return QueryState(
            content=self.design.content.labels(labels),
            position=None,
            reference=keep_inside(boxes, self.design.epsilon),
        )


class AnchorParameters(nn.Module):
    """Learned anchors [N, R] of N queries with shared content."""

    def __init__(self, anchors: Tensor):
        super().__init__()
        self.anchors = nn.Parameter(anchors)


class SharedBoxQueries(nn.Module):
    """A learned box per query and shared content (2201.12329, sec. 4).

    Given boxes go through `keep_inside`. Subclasses with other anchors override
    `new_parameters`, `references` and `reference_of`.
    """

    starts_from_masks = False

    def __init__(
        self, *, content: QueryContent, shared: SharedContent, num_queries: int, epsilon: float
    ):
        super().__init__()
        self.content = content
        self.shared = shared
        self.epsilon = epsilon
        self.learned = self.new_parameters(num_queries)

    def new_parameters(self, num_queries: int, own_head: bool = True) -> AnchorParameters:
        """Create the anchors of `num_queries` extra queries: boxes as logits [N, 4]."""
        return AnchorParameters(torch.randn(num_queries, 4))

    def references(self, anchors: Tensor) -> Tensor:
        """Return references [N, R] from learned anchors [N, R]."""
        return anchors.sigmoid()

    def reference_of(self, boxes: Tensor) -> Tensor:
        """Return references [B, T, R] from boxes [B, T, 4]."""
        return keep_inside(boxes, self.epsilon)

    def bind(self, memory: Memory) -> SharedBoxSource:
        """Create the source of queries of one forward."""
        return SharedBoxSource(self, memory)


def shared_box_queries(config: SharedContentConfig, content: QueryContent) -> SharedBoxQueries:
    """Build `SharedBoxQueries`; the config decides on learned content and patterns."""
    return SharedBoxQueries(
        content=content,
        shared=SharedContent(
            content=content,
            is_learned=config.shares_content,
            num_patterns=config.num_patterns,
        ),
        num_queries=config.num_queries,
        epsilon=config.epsilon,
    )


class SharedBoxSource:
    """Queries of one forward of `SharedBoxQueries`."""

    def __init__(self, design: SharedBoxQueries, memory: Memory):
        self.design = design
        self.batch = memory.tokens.shape[0]

    def queries(self, learned: AnchorParameters | None = None, first_rank: int = 0) -> Queries:
        """Return one "match" segment with a query per pattern and anchor of `learned`.

        `learned` defaults to the design's own parameters.
        """
        learned = self.design.learned if learned is None else learned
        content, anchors = self.design.shared(learned.anchors)
        state = QueryState(
            content=content.expand(self.batch, -1, -1),
            position=None,
            reference=self.design.references(anchors).expand(self.batch, -1, -1),
        )
        return Queries(state, (Segment("match", content.shape[0]),))

    def from_boxes(self, labels: Tensor, boxes: Tensor) -> QueryState:
        """Return queries for labels [B, T] int64 and boxes [B, T, 4]."""
        return QueryState(
            content=self.design.content.labels(labels),
            position=None,
            reference=self.design.reference_of(boxes),
        )
