"""Query designs: where the decoder's queries come from, and how a box becomes a query.

    design.learned                              what is learned for each matched query
    design.new_parameters(num_queries, own_head)   the same for further ones, owned by who asks (auxiliary queries)
    design.bind(memory) -> source              lives for one forward
    source.queries(learned, first_rank)         -> Queries with one "match" segment
    source.from_boxes(labels, boxes)           -> QueryState

`own_head` and `first_rank` matter only where queries are chosen among proposals of the encoder
(`models.proposals`): whether new tables choose on their own, or go on at a rank of the first choice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.layers.query_content import QueryContent, SharedContent
from dn_detr.models.model_config import SharedContentConfig
from dn_detr.structures import Memory, Queries, QueryState, Segment


class BoxQueryParameters(nn.Module):
    """Learned rows of N queries: content [N, C] and boxes [N, 4] as logits (2201.12329, sec. 4)."""

    def __init__(self, *, content: nn.Parameter):
        super().__init__()
        self.content = content
        self.box_logits = nn.Parameter(torch.randn(content.shape[0], 4))


class BoxQueries(nn.Module):
    """Learned content and a learned 4-D box for each query; the box is the reference.

    epsilon: boxes that an auxiliary query module brings are clamped to [epsilon, 1 - epsilon], so that their logits
    are finite.
    """

    starts_from_masks = False

    def __init__(self, *, content: QueryContent, num_queries: int, epsilon: float):
        super().__init__()
        self.content = content
        self.epsilon = epsilon
        self.learned = self.new_parameters(num_queries)

    def new_parameters(
        self,
        num_queries: int,
        own_head: bool = True,  # noqa: ARG002 - other designs use it
    ) -> BoxQueryParameters:
        """Rows for further queries, owned by whoever asks; there are no proposals to head."""
        return BoxQueryParameters(content=self.content.new_rows(num_queries))

    def bind(self, memory: Memory) -> BoxQuerySource:
        """A source of queries for this memory; it lives for one forward."""
        return BoxQuerySource(self, memory)


class BoxQuerySource:
    """The queries of one forward of `BoxQueries`."""

    def __init__(self, design: BoxQueries, memory: Memory):
        self.design = design
        self.batch = memory.tokens.shape[0]

    def queries(
        self,
        learned: BoxQueryParameters | None = None,
        first_rank: int = 0,  # noqa: ARG002 - other designs use it
    ) -> Queries:
        """One "match" segment of the rows of `learned` (default: the design's own)."""
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
        """Queries of labels [B, T] at boxes [B, T, 4]."""
        epsilon = self.design.epsilon
        return QueryState(
            content=self.design.content.labels(labels),
            position=None,
            reference=boxes.clamp(epsilon, 1 - epsilon),
        )


class AnchorParameters(nn.Module):
    """Learned places [N, R] of N queries that share their content."""

    def __init__(self, anchors: Tensor):
        super().__init__()
        self.anchors = nn.Parameter(anchors)


class SharedBoxQueries(nn.Module):
    """A learned 4-D box for each query, and content that all share (2201.12329, sec. 4).

    epsilon: boxes that an auxiliary query module brings are clamped to [epsilon, 1 - epsilon]. Other kinds of
    places override `new_parameters`, `references` and `reference_of`.
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

    def new_parameters(
        self,
        num_queries: int,
        own_head: bool = True,  # noqa: ARG002 - other designs use it
    ) -> AnchorParameters:
        """Rows for further queries, owned by whoever asks: boxes as logits."""
        return AnchorParameters(torch.randn(num_queries, 4))

    def references(self, anchors: Tensor) -> Tensor:
        """Learned rows [N, R] to references [N, R]."""
        return anchors.sigmoid()

    def reference_of(self, boxes: Tensor) -> Tensor:
        """Boxes [B, T, 4] to references [B, T, R]."""
        return boxes.clamp(self.epsilon, 1 - self.epsilon)

    def bind(self, memory: Memory) -> SharedBoxSource:
        """A source of queries for this memory; it lives for one forward."""
        return SharedBoxSource(self, memory)


def shared_box_queries(config: SharedContentConfig, content: QueryContent) -> SharedBoxQueries:
    """With or without a shared learned content vector, and patterns."""
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
    """The queries of one forward of `SharedBoxQueries`."""

    def __init__(self, design: SharedBoxQueries, memory: Memory):
        self.design = design
        self.batch = memory.tokens.shape[0]

    def queries(
        self,
        learned: AnchorParameters | None = None,
        first_rank: int = 0,  # noqa: ARG002 - other designs use it
    ) -> Queries:
        """One "match" segment of the rows of `learned` (default: the design's own), once for every
        pattern."""
        learned = self.design.learned if learned is None else learned
        content, anchors = self.design.shared(learned.anchors)
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
