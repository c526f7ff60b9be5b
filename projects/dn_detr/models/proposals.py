"""Two-stage queries: the best encoder proposals become queries.

Tokens in the padding or too near to the image border make no proposal (`is_empty`). If an image has
fewer proposals than queries, its last queries are empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dn_detr.layers.box_ops import at_least_float32, keep_inside
from dn_detr.layers.position_encoding import sine
from dn_detr.layers.query_content import QueryContent
from dn_detr.models.encoder import token_centers
from dn_detr.models.prediction_heads import box_head, class_head, refine_box
from dn_detr.structures import Memory, Predictions, Queries, QueryState, Segment

BASE_SIZE = 0.05
"""Anchor size at the finest level, doubled at each coarser one (2010.04159, A.4)."""

SMALLEST_COORDINATE = 0.01
"""Tokens need an anchor with all coordinates in (0.01, 0.99) (code of 2010.04159)."""


@dataclass(frozen=True, eq=False)
class Proposals:
    """Proposals of S tokens.

    logits [B, S, K]; boxes [B, S, 4] cxcywh, 0.5 if empty; is_empty [B, S] bool.
    """

    logits: Tensor
    boxes: Tensor
    is_empty: Tensor


class ProposalHead(nn.Module):
    """Class and box heads on the tokens; boxes are relative to square anchors (2010.04159, A.4)."""

    as_published = False
    """Padding and border tokens make proposals too, all of them the box (1, 1, 1, 1)."""

    def __init__(self, *, channels: int, num_classes: int):
        super().__init__()
        self.project = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.class_head = class_head(channels, num_classes)
        self.box_head = box_head(channels)
        nn.init.xavier_uniform_(self.project.weight)

    def forward(self, memory: Memory) -> Proposals:
        """Return one proposal per token."""
        anchors, is_empty = token_boxes(memory, [level for level, _ in enumerate(memory.shapes)])
        tokens = self.norm(self.project(memory.tokens.masked_fill(is_empty[..., None], 0)))
        boxes = refine_box(anchors, at_least_float32(self.box_head(tokens)), SMALLEST_COORDINATE)
        return Proposals(
            logits=at_least_float32(self.class_head(tokens)),
            boxes=torch.where(is_empty[..., None], 1.0 if self.as_published else 0.5, boxes),
            is_empty=is_empty & (not self.as_published),
        )


def token_boxes(memory: Memory, doublings: list[int]) -> tuple[Tensor, Tensor]:
    """Compute square anchors of size BASE_SIZE * 2**doublings[level] at the token centres.

    Returns:
        Anchors [B, S, 4] cxcywh, and is_empty [B, S] bool, True for padding and anchors too near to
        the border.
    """
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
    """Select `count` tokens from rank first_rank on, by scores [B, S] and is_empty [B, S] bool.

    Empty tokens rank last; ranks beyond the number of tokens are empty.

    Returns:
        Token index [B, count] int64 and is_empty [B, count] bool.
    """
    tokens, top_k = scores.shape[1], first_rank + count
    scores = F.pad(scores.masked_fill(is_empty, -torch.inf), (0, top_k), value=-torch.inf)
    best, index = scores.topk(top_k, dim=1)
    best, index = best.narrow(1, first_rank, count), index.narrow(1, first_rank, count)
    return index.clamp(max=tokens - 1), best == -torch.inf


def check_ranking(has_no_object: bool) -> None:
    """Raise ValueError if there is a "no object" logit.

    Tokens are ranked by their best class (2010.04159, A.4; 2203.03605, sec. 3.4), and the
    "no object" logit would be ranked as a class.
    """
    if has_no_object:
        raise ValueError(
            'two-stage queries are ranked by sigmoid scores, so LOSS.KIND must be "focal" or '
            '"mal"; "softmax" adds a "no object" logit, which would be ranked as a class'
        )


class BoxTransform(nn.Module):
    """Position and content from the sine encoding of boxes (2010.04159, two-stage code)."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.project = nn.Linear(2 * channels, 2 * channels)
        self.norm = nn.LayerNorm(2 * channels)
        nn.init.xavier_uniform_(self.project.weight)

    def forward(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Return position and content [B, Q, C] from boxes [B, Q, 4]."""
        encoded = sine(boxes, self.channels // 2, temperature=10000.0).flatten(-2)
        return self.norm(self.project(encoded.to(self.project.weight.dtype))).chunk(2, dim=-1)


class ProposalParameters(nn.Module):
    """Parameters of N queries.

    content [N, C] or None (computed from the box); head: their proposal head, None: that of the
    design.
    """

    def __init__(self, *, num_queries: int, content: nn.Parameter | None, head: nn.Module | None):
        super().__init__()
        self.num_queries = num_queries
        self.content = content
        self.head = head


class ProposalQueries(nn.Module):
    """Queries whose references are the best proposals, detached.

    Args:
        transform: Computes positions from boxes, or None if the decoder computes them.
        has_rows: Learn the content per rank (mixed query selection, 2203.03605, sec. 3.4); else the
            transform computes it.
        is_class_agnostic: Train all proposals to predict objectness as class 0; else train the
            selected ones with their classes.
        has_no_object: Must be False, see `check_ranking`.
        epsilon: Of `keep_inside`, for given boxes.
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
            raise ValueError("has_rows must be True without a transform, got False")
        self.content = content
        self.transform = transform
        self.has_rows = has_rows
        self.is_class_agnostic = is_class_agnostic
        self.epsilon = epsilon
        self.learned = self.new_parameters(num_queries)

    def new_parameters(self, num_queries: int, own_head: bool = True) -> ProposalParameters:
        """Create the parameters of extra queries, with a proposal head if `own_head`."""
        content = self.content
        head = ProposalHead(channels=content.channels, num_classes=content.num_classes)
        return ProposalParameters(
            num_queries=num_queries,
            content=content.new_rows(num_queries) if self.has_rows else None,
            head=head if own_head else None,
        )

    def bind(self, memory: Memory) -> ProposalSource:
        """Create the source of queries of one forward."""
        return ProposalSource(self, memory)


class ProposalSource:
    """Queries of one forward of `ProposalQueries`."""

    def __init__(self, design: ProposalQueries, memory: Memory):
        self.design = design
        self.memory = memory
        self.proposals = design.learned.head(memory)

    def queries(self, learned: ProposalParameters | None = None, first_rank: int = 0) -> Queries:
        """Return one "match" segment of the proposals from rank first_rank on.

        `learned` defaults to the design's own parameters. The result includes the proposals if
        `learned` has a head.
        """
        design, batch = self.design, self.memory.tokens.shape[0]
        learned = design.learned if learned is None else learned
        proposals = self.proposals
        if learned.head not in (None, design.learned.head):
            proposals = learned.head(self.memory)
        is_agnostic = design.is_class_agnostic
        scores = proposals.logits[..., 0] if is_agnostic else proposals.logits.amax(-1)
        index, is_empty = best_tokens(
            scores.detach(), proposals.is_empty, first_rank, learned.num_queries
        )
        selected = Proposals(
            logits=proposals.logits.gather(
                1, index[..., None].expand(-1, -1, proposals.logits.shape[2])
            ),
            boxes=proposals.boxes.gather(1, index[..., None].expand(-1, -1, 4)),
            is_empty=is_empty,
        )
        reference = torch.where(is_empty[..., None], 0.5, selected.boxes.detach())
        position, content = self._transform(reference)
        if design.has_rows:
            content = design.content.matched(learned.content).expand(batch, -1, -1)
        return Queries(
            state=QueryState(content, position, reference),
            segments=(Segment("match", learned.num_queries, is_empty=is_empty),),
            proposals=None
            if learned.head is None
            else _as_predictions(proposals if is_agnostic else selected, is_agnostic),
        )

    def from_boxes(self, labels: Tensor, boxes: Tensor) -> QueryState:
        """Return queries for labels [B, T] int64 and boxes [B, T, 4]."""
        boxes = keep_inside(boxes, self.design.epsilon)
        return QueryState(self.design.content.labels(labels), self._transform(boxes)[0], boxes)

    def _transform(self, boxes: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Position and content of boxes [B, Q, 4], None without a transform."""
        return (None, None) if self.design.transform is None else self.design.transform(boxes)


def _as_predictions(proposals: Proposals, is_class_agnostic: bool) -> Predictions:
    """Convert proposals to predictions of a single layer, for matching and losses."""
    segment = Segment("match", proposals.logits.shape[1], is_empty=proposals.is_empty)
    return Predictions(
        logits=proposals.logits[None],
        boxes=proposals.boxes[None],
        references=(None,),
        segments=(segment,),
        is_class_agnostic=is_class_agnostic,
    )
