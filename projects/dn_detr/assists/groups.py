"""Group DETR: several groups of queries, each matched one-to-one (2207.13085).

In training, K - 1 further groups of learned queries go through the same decoder without seeing each
other, and every group is matched on its own; the loss is the mean over the groups. Inference uses
the first group alone. In two-stage models each group chooses among proposals of its own head.
"""

from __future__ import annotations

from torch import nn

from dn_detr.assists.further import append, weigh_match
from dn_detr.structures import Queries, Segment, Targets


class Groups(nn.Module):
    """Appends a "groups" segment of num_groups - 1 groups of `num_queries` (11 groups in the paper).

    Owns what these groups learn (`query_design.new_tables`), so that the plain model has none of it.
    """

    def __init__(self, *, query_design: nn.Module, num_queries: int, num_groups: int):
        super().__init__()
        if num_groups < 2:
            raise ValueError(f"num_groups must be at least 2, got {num_groups}")
        self.tables = nn.ModuleList(
            query_design.new_tables(num_queries) for _ in range(num_groups - 1)
        )

    def forward(self, queries: Queries, source, targets: Targets) -> Queries:
        """source: has `queries(tables) -> Queries`."""
        further = [source.queries(tables) for tables in self.tables]
        share = 1 / (1 + len(further))
        segment = Segment("groups", 0, copies=len(further), weight=1 - share)
        return append(weigh_match(queries, share), further, segment)
