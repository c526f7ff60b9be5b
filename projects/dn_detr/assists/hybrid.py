"""H-DETR: a second set of queries, matched one-to-many (hybrid branch; 2207.13080, sec. 3.2).

In training, T further queries go through the same decoder; neither set sees the other. In the second
each object is matched to `repeats` queries. Two-stage models give it the proposals ranked next after
those of the first set.
"""

from __future__ import annotations

from torch import nn

from dn_detr.assists.further import append
from dn_detr.structures import Queries, Segment, Targets


class Hybrid(nn.Module):
    """Appends a "hybrid" segment of `num_queries` (T; 1500) with `repeats` matches an object (K; 6).

    weight: of its losses (lambda; 1). Owns what these queries learn (`query_design.new_tables`).
    """

    def __init__(
        self, *, query_design: nn.Module, num_queries: int, repeats: int, weight: float = 1.0
    ):
        super().__init__()
        if num_queries < 1 or repeats < 1:
            raise ValueError(
                "hybrid matching needs at least 1 query and 1 repeat, got "
                f"{num_queries} and {repeats}"
            )
        self.repeats = repeats
        self.weight = weight
        self.tables = query_design.new_tables(num_queries, own_head=False)

    def forward(self, queries: Queries, source, targets: Targets) -> Queries:
        """source: has `queries(tables, first_rank) -> Queries`."""
        match = next(segment for segment in queries.segments if segment.name == "match")
        further = source.queries(self.tables, first_rank=match.size)
        segment = Segment(
            "hybrid", 0, repeats=self.repeats, copies=self.repeats, weight=self.weight
        )
        return append(queries, [further], segment)
