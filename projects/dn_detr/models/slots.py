"""Queries that are learned slots: each has a vector of its own, from which its point follows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.layers.content import QueryContent
from dn_detr.structures import Memory, Queries, QueryState, Segment


class SlotTables(nn.Module):
    """Learned rows of N queries: content [N, C] and position [N, C]."""

    def __init__(self, *, content: nn.Parameter):
        super().__init__()
        self.content = content
        self.position = nn.Parameter(torch.randn_like(content))


class SlotQueries(nn.Module):
    """Learned content and position; the reference is a point that a linear layer reads from the
    position (2010.04159, sec. 4.1).

    A box that an assist brings has its centre, clamped to [epsilon, 1 - epsilon], as reference, and
    a linear embedding of all four coordinates as position, because a point cannot tell its size.
    That embedding exists only with labels.
    """

    def __init__(self, *, content: QueryContent, num_queries: int, epsilon: float):
        super().__init__()
        self.content = content
        self.epsilon = epsilon
        self.reference_points = nn.Linear(content.channels, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)
        self.box_embedding = nn.Linear(4, content.channels) if content.has_labels else None
        self.tables = self.new_tables(num_queries)

    def new_tables(self, num_queries: int, own_head: bool = True) -> SlotTables:
        """Rows for further queries, owned by whoever asks; there are no proposals to head."""
        return SlotTables(content=self.content.new_rows(num_queries))

    def bind(self, memory: Memory) -> SlotSource:
        """A source of queries for this memory; it lives for one forward."""
        return SlotSource(self, memory)


class SlotSource:
    """The queries of one forward of `SlotQueries`."""

    def __init__(self, design: SlotQueries, memory: Memory):
        self.design = design
        self.batch = memory.tokens.shape[0]

    def queries(self, tables: SlotTables | None = None, first_rank: int = 0) -> Queries:
        """One "match" segment of the rows of `tables` (default: the design's own)."""
        tables = self.design.tables if tables is None else tables
        content = self.design.content.matched(tables.content)
        points = self.design.reference_points(tables.position).sigmoid()
        state = QueryState(
            content=content.expand(self.batch, -1, -1),
            position=tables.position.expand(self.batch, -1, -1),
            reference=points.expand(self.batch, -1, -1),
        )
        return Queries(state, (Segment("match", content.shape[0]),))

    def from_boxes(self, labels: Tensor, boxes: Tensor) -> QueryState:
        """Queries of labels [B, T] at boxes [B, T, 4]."""
        epsilon = self.design.epsilon
        content = self.design.content.labels(labels)
        return QueryState(
            content=content,
            position=self.design.box_embedding(boxes.to(content.dtype)),
            reference=boxes[..., :2].clamp(epsilon, 1 - epsilon),
        )
