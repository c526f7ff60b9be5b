"""Query designs: where the decoder's queries come from, and how a box becomes a query."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.layers.content import QueryContent
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

    def new_tables(self, num_queries: int) -> BoxTables:
        """Rows for further queries, owned by whoever asks."""
        return BoxTables(content=self.content.new_rows(num_queries))

    def bind(self, memory: Memory) -> BoxQuerySource:
        """A source of queries for this memory; it lives for one forward."""
        return BoxQuerySource(self, memory)


class BoxQuerySource:
    """The queries of one forward of `BoxQueries`."""

    def __init__(self, design: BoxQueries, memory: Memory):
        self.design = design
        self.batch = memory.tokens.shape[0]

    def queries(self, tables: BoxTables | None = None) -> Queries:
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

