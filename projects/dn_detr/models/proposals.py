"""Two-stage queries: every token proposes a box, and the best of them become queries.

Padding tokens, and those whose box would leave the image, propose nothing: they are empty slots of
the proposals, and where an image has fewer proposals than queries, the last queries are empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dn_detr.layers.box_ops import at_least_float32
from dn_detr.layers.position_encoding import sine
from dn_detr.layers.query_content import QueryContent
from dn_detr.models.encoder import token_centers
from dn_detr.models.prediction_heads import box_head, class_head, refine_box
from dn_detr.structures import Memory, Predictions, Queries, QueryState, Segment

BASE_SIZE = 0.05
"""Width and height of the boxes of the finest level, doubled at each coarser one (2010.04159, A.4)."""

SMALLEST_COORDINATE = 0.01
"""Tokens whose box has a coordinate outside of (0.01, 0.99) propose nothing (code of 2010.04159)."""


@dataclass(frozen=True, eq=False)
class Proposals:
    """What the tokens propose: logits [B, S, K]; boxes [B, S, 4] (.5 where empty); is_empty [B, S]."""

    logits: Tensor
    boxes: Tensor
    is_empty: Tensor


class ProposalHead(nn.Module):
    """Memory to proposals: each token's box is an offset from a square around its place."""

    def __init__(self, *, channels: int, num_classes: int):
        super().__init__()
        self.project = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.class_head = class_head(channels, num_classes)
        self.box_head = box_head(channels)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, memory: Memory) -> Proposals:
        anchors, is_empty = token_boxes(memory, [level for level, _ in enumerate(memory.shapes)])
        tokens = self.norm(self.project(memory.tokens.masked_fill(is_empty[..., None], 0)))
        boxes = refine_box(anchors, at_least_float32(self.box_head(tokens)), SMALLEST_COORDINATE)
        return Proposals(
            logits=at_least_float32(self.class_head(tokens)),
            boxes=torch.where(is_empty[..., None], 0.5, boxes),
            is_empty=is_empty,
        )


def token_boxes(memory: Memory, doublings: list[int]) -> tuple[Tensor, Tensor]:
    """A square around the centre of every token, [B, S, 4], and is_empty [B, S]: the token is padding,
    or its square too near to the border. doublings: of BASE_SIZE, for each level."""
    centers = token_centers(memory)
    sizes = [
        centers.new_full((height * width, 2), BASE_SIZE * 2**exponent)
        for (height, width), exponent in zip(memory.shapes, doublings, strict=True)
    ]
    boxes = torch.cat((centers, torch.cat(sizes).expand_as(centers)), dim=-1)
    is_inside = ((boxes > SMALLEST_COORDINATE) & (boxes < 1 - SMALLEST_COORDINATE)).all(-1)
    return boxes, memory.padding | ~is_inside


def best_tokens(
    scores: Tensor, is_empty: Tensor, first_rank: int, count: int
) -> tuple[Tensor, Tensor]:
    """Tokens ranked first_rank to first_rank + count by score [B, S]: index, is_empty [B, count].

    Empty tokens rank last and stay empty; beyond the last token all is empty.
    """
    tokens, enough = scores.shape[1], first_rank + count
    scores = F.pad(scores.masked_fill(is_empty, -torch.inf), (0, enough), value=-torch.inf)
    best, index = scores.topk(enough, dim=1)
    best, index = best.narrow(1, first_rank, count), index.narrow(1, first_rank, count)
    return index.clamp(max=tokens - 1), best == -torch.inf


def check_ranking(has_no_object: bool) -> None:
    """ValueError where logits have a column for "no object": tokens are ranked by the sigmoid of
    their best class (2010.04159, A.4; 2203.03605, sec. 3.4), and that column would win."""
    if has_no_object:
        raise ValueError(
            "two-stage queries are ranked by sigmoid scores of classes, so the class loss must be "
            'LOSS.KIND "focal" or "mal"; "softmax" has a further logit for "no object", which would '
            "rank as a class"
        )


class BoxTransform(nn.Module):
    """A linear layer and norm of a box's sines: boxes [B, Q, 4] -> position, content [B, Q, C] each
    (2010.04159, code of the two-stage variant)."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.project = nn.Linear(2 * channels, 2 * channels)
        self.norm = nn.LayerNorm(2 * channels)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        encoded = sine(boxes, self.channels // 2, temperature=10000.0).flatten(-2)
        return self.norm(self.project(encoded.to(self.project.weight.dtype))).chunk(2, dim=-1)


class ProposalParameters(nn.Module):
    """What is learned for N queries: content [N, C], or None where it follows from the box, and the
    head whose proposals they are; None: the design's own head."""

    def __init__(self, *, num_queries: int, content: nn.Parameter | None, head: nn.Module | None):
        super().__init__()
        self.num_queries = num_queries
        self.content = content
        self.head = head


class ProposalQueries(nn.Module):
    """The best proposals become the references of the queries, without gradient.

    transform: gives the position of a query from its box; None: positions follow from the reference.
    has_rows: content is learned for each rank (mixed query selection, 2203.03605, sec. 3.4), else it
    comes from the transform too. is_class_agnostic: all proposals are trained, to say object or not
    with class 0; else the chosen ones, with their classes.
    has_no_object: must be False, see `check_ranking`. Boxes that an auxiliary query module brings are clamped to
    [epsilon, 1 - epsilon].
    """

    starts_from_masks = False

    def __init__(
        self,
        *,
        content: QueryContent,
        num_queries: int,
        transform: BoxTransform | None,
        has_rows: bool,
        is_class_agnostic: bool,
        has_no_object: bool,
        epsilon: float,
    ):
        super().__init__()
        check_ranking(has_no_object)
        if transform is None and not has_rows:
            raise ValueError("without a transform of boxes, content must have learned rows")
        self.content = content
        self.transform = transform
        self.has_rows = has_rows
        self.is_class_agnostic = is_class_agnostic
        self.epsilon = epsilon
        self.learned = self.new_parameters(num_queries)

    def new_parameters(self, num_queries: int, own_head: bool = True) -> ProposalParameters:
        """What further queries need, owned by whoever asks."""
        content = self.content
        head = ProposalHead(channels=content.channels, num_classes=content.num_classes)
        return ProposalParameters(
            num_queries=num_queries,
            content=content.new_rows(num_queries) if self.has_rows else None,
            head=head if own_head else None,
        )

    def bind(self, memory: Memory) -> ProposalSource:
        """A source of queries for this memory; it lives for one forward."""
        return ProposalSource(self, memory)


class ProposalSource:
    """The queries of one forward of `ProposalQueries`."""

    def __init__(self, design: ProposalQueries, memory: Memory):
        self.design = design
        self.memory = memory
        self.proposals = design.learned.head(memory)

    def queries(self, learned: ProposalParameters | None = None, first_rank: int = 0) -> Queries:
        """One "match" segment of the proposals ranked first_rank and below, by the head of `learned`
        (default: the design's own). Proposals come with the queries whose head they are."""
        design, batch = self.design, self.memory.tokens.shape[0]
        learned = design.learned if learned is None else learned
        found = self.proposals
        if learned.head not in (None, design.learned.head):
            found = learned.head(self.memory)
        is_agnostic = design.is_class_agnostic
        scores = found.logits[..., 0] if is_agnostic else found.logits.amax(-1)
        index, is_empty = best_tokens(
            scores.detach(), found.is_empty, first_rank, learned.num_queries
        )
        chosen = Proposals(
            logits=found.logits.gather(1, index[..., None].expand(-1, -1, found.logits.shape[2])),
            boxes=found.boxes.gather(1, index[..., None].expand(-1, -1, 4)),
            is_empty=is_empty,
        )
        reference = torch.where(is_empty[..., None], 0.5, chosen.boxes.detach())
        position, content = self._describe(reference)
        if design.has_rows:
            content = design.content.matched(learned.content).expand(batch, -1, -1)
        return Queries(
            state=QueryState(content, position, reference),
            segments=(Segment("match", learned.num_queries, is_empty=is_empty),),
            proposals=None
            if learned.head is None
            else _as_predictions(found if is_agnostic else chosen, is_agnostic),
        )

    def from_boxes(self, labels: Tensor, boxes: Tensor) -> QueryState:
        """Queries of labels [B, T] at boxes [B, T, 4]."""
        epsilon = self.design.epsilon
        boxes = boxes.clamp(epsilon, 1 - epsilon)
        return QueryState(self.design.content.labels(labels), self._describe(boxes)[0], boxes)

    def _describe(self, boxes: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.design.transform is None else self.design.transform(boxes)


def _as_predictions(proposals: Proposals, is_class_agnostic: bool) -> Predictions:
    """Proposals as predictions of a single layer, so that they are matched and trained like any."""
    segment = Segment("match", proposals.logits.shape[1], is_empty=proposals.is_empty)
    return Predictions(
        logits=proposals.logits[None],
        boxes=proposals.boxes[None],
        references=(None,),
        segments=(segment,),
        is_class_agnostic=is_class_agnostic,
    )
