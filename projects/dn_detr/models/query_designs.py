"""Query designs: where the decoder's queries come from, and how a box becomes a query.

    design.tables                              what is learned for each matched query
    design.new_tables(num_queries, own_head)   the same for further ones, owned by who asks (assists)
    design.bind(memory) -> source              lives for one forward
    source.queries(tables, first_rank)         -> Queries with one "match" segment
    source.from_boxes(labels, boxes)           -> QueryState

`own_head` and `first_rank` matter only where queries are chosen among proposals of the encoder
(`models.proposals`): whether new tables choose on their own, or go on at a rank of the first choice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.layers.query_content import QueryContent, SharedContent
from dn_detr.models.model_config import Numbers
from dn_detr.structures import Memory, Queries, QueryState, Segment


class BoxTables(nn.Module):
    """Learned rows of N queries: content [N, C] and boxes [N, 4] as logits (2201.12329, sec. 4)."""

    def __init__(self, *, content: nn.Parameter):
        super().__init__()
        self.content = content
        self.box_logits = nn.Parameter(torch.randn(content.shape[0], 4))


class BoxQueries(nn.Module):
    """Learned content and a learned 4-D box for each query; the box is the reference.

    epsilon: boxes that an assist brings are clamped to [epsilon, 1 - epsilon], so that their logits
    are finite.
    """

    def __init__(self, *, content: QueryContent, num_queries: int, epsilon: float):
        super().__init__()
        self.content = content
        self.epsilon = epsilon
        self.tables = self.new_tables(num_queries)

    def new_tables(self, num_queries: int, own_head: bool = True) -> BoxTables:
        """Rows for further queries, owned by whoever asks; there are no proposals to head."""
        return BoxTables(content=self.content.new_rows(num_queries))

    def bind(self, memory: Memory) -> BoxQuerySource:
        """A source of queries for this memory; it lives for one forward."""
        return BoxQuerySource(self, memory)


class BoxQuerySource:
    """The queries of one forward of `BoxQueries`."""

    def __init__(self, design: BoxQueries, memory: Memory):
        self.design = design
        self.batch = memory.tokens.shape[0]

    def queries(self, tables: BoxTables | None = None, first_rank: int = 0) -> Queries:
        """One "match" segment of the rows of `tables` (default: the design's own)."""
        tables = self.design.tables if tables is None else tables
        content = self.design.content.matched(tables.content)
        reference = tables.box_logits.sigmoid()
        state = QueryState(
            content=content.expand(self.batch, -1, -1),
            position=None,
            reference=reference.expand(self.batch, -1, -1),
        )
        return Queries(state, (Segment("match", content.shape[0]),))

    def from_boxes(self, labels: Tensor, boxes: Tensor) -> QueryState:
        """Queries of labels [B, T] at boxes [B, T, 4]."""
        epsilon = self.design.epsilon
        return QueryState(
            content=self.design.content.labels(labels),
            position=None,
            reference=boxes.clamp(epsilon, 1 - epsilon),
        )


class AnchorTables(nn.Module):
    """Learned places [N, R] of N queries that share their content."""

    def __init__(self, anchors: Tensor):
        super().__init__()
        self.anchors = nn.Parameter(anchors)


class SharedBoxQueries(nn.Module):
    """A learned 4-D box for each query, and content that all share (2201.12329, sec. 4).

    epsilon: boxes that an assist brings are clamped to [epsilon, 1 - epsilon]. Other kinds of
    places override `new_tables`, `references` and `reference_of`.
    """

    def __init__(
        self, *, content: QueryContent, shared: SharedContent, num_queries: int, epsilon: float
    ):
        super().__init__()
        self.content = content
        self.shared = shared
        self.epsilon = epsilon
        self.tables = self.new_tables(num_queries)

    def new_tables(self, num_queries: int, own_head: bool = True) -> AnchorTables:
        """Rows for further queries, owned by whoever asks: boxes as logits."""
        return AnchorTables(torch.randn(num_queries, 4))

    def references(self, anchors: Tensor) -> Tensor:
        """Learned rows [N, R] to references [N, R]."""
        return anchors.sigmoid()

    def reference_of(self, boxes: Tensor) -> Tensor:
        """Boxes [B, T, 4] to references [B, T, R]."""
        return boxes.clamp(self.epsilon, 1 - self.epsilon)

    def bind(self, memory: Memory) -> SharedBoxSource:
        """A source of queries for this memory; it lives for one forward."""
        return SharedBoxSource(self, memory)


def shared_box_queries(numbers: Numbers, content: QueryContent) -> SharedBoxQueries:
    """As the numbers say: with or without a learned vector, and patterns."""
    return SharedBoxQueries(
        content=content,
        shared=SharedContent(
            content=content,
            is_learned=numbers.shares_content,
            num_patterns=numbers.num_patterns,
        ),
        num_queries=numbers.num_queries,
        epsilon=numbers.epsilon,
    )


class SharedBoxSource:
    """The queries of one forward of `SharedBoxQueries`."""

    def __init__(self, design: SharedBoxQueries, memory: Memory):
        self.design = design
        self.batch = memory.tokens.shape[0]

    def queries(self, tables: AnchorTables | None = None, first_rank: int = 0) -> Queries:
        """One "match" segment of the rows of `tables` (default: the design's own), once for every
        pattern."""
        tables = self.design.tables if tables is None else tables
        content, anchors = self.design.shared(tables.anchors)
        state = QueryState(
            content=content.expand(self.batch, -1, -1),
            position=None,
            reference=self.design.references(anchors).expand(self.batch, -1, -1),
        )
        return Queries(state, (Segment("match", content.shape[0]),))

    def from_boxes(self, labels: Tensor, boxes: Tensor) -> QueryState:
        """Queries of labels [B, T] at boxes [B, T, 4]."""
        return QueryState(
            content=self.design.content.labels(labels),
            position=None,
            reference=self.design.reference_of(boxes),
        )
