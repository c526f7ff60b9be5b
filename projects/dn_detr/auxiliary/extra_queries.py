"""Extra matched queries in training: Group DETR (2207.13085) and H-DETR (2207.13080).

Group DETR: extra groups of learned queries pass through the same decoder. Groups do not attend to
each other, and each is matched one-to-one separately; the loss is the mean over the groups. In
two-stage models, each group selects among the proposals of its own head.

H-DETR (sec. 3.2): a second set of queries passes through the same decoder; the two sets do not
attend to each other. Each object is matched to `matches_per_object` queries of the second set; in
two-stage models that set takes the proposals ranked after those of the first.

Inference uses only the first group or set. The modules here own the extra parameters, so that the
model without them has none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dn_detr.protocols import QueryDesign, QuerySource
from dn_detr.structures import Predictions, Queries, QueryState, Segment, Targets


class GroupQueries(nn.Module):
    """Append a "group" segment of num_groups - 1 groups of `num_queries` queries.

    Args:
        query_design: makes the parameters of the extra groups (`new_parameters`).
        num_groups: groups in all; 11 in the paper.
    """

    hides_labels = False

    def __init__(self, *, query_design: QueryDesign, num_queries: int, num_groups: int):
        super().__init__()
        if num_groups < 2:
            raise ValueError(f"num_groups must be at least 2, got {num_groups}")
        self.learned = nn.ModuleList(
            query_design.new_parameters(num_queries) for _ in range(num_groups - 1)
        )

    def forward(self, queries: Queries, source: QuerySource, targets: Targets) -> Queries:
        """Append the extra groups."""
        extra = [source.queries(learned) for learned in self.learned]
        share = 1 / (1 + len(extra))
        segment = Segment("group", 0, positives_per_object=len(extra), weight=1 - share)
        return append_segment(scale_match_weight(queries, share), extra, segment)


@dataclass(frozen=True, kw_only=True)
class HybridMatching:
    """Hyper-parameters of H-DETR's one-to-many branch (2207.13080, sec. 4.1)."""

    num_queries: int = 1500
    # Queries that each object is matched to.
    matches_per_object: int = 6
    # Factor on the losses of this branch.
    weight: float = 1.0


class HybridQueries(nn.Module):
    """Append a "hybrid" segment of T queries with several matches an object.

    Owns the parameters of these queries (`query_design.new_parameters`).
    """

    hides_labels = False

    def __init__(self, config: HybridMatching, *, query_design: QueryDesign):
        super().__init__()
        if config.num_queries < 1 or config.matches_per_object < 1:
            raise ValueError(
                "hybrid matching needs num_queries and matches_per_object of at least 1, got "
                f"{config.num_queries} and {config.matches_per_object}"
            )
        self.config = config
        self.learned = query_design.new_parameters(config.num_queries, own_head=False)

    def forward(self, queries: Queries, source: QuerySource, targets: Targets) -> Queries:
        """Append the one-to-many queries."""
        match = next(segment for segment in queries.segments if segment.name == "match")
        extra = source.queries(self.learned, first_rank=match.size)
        segment = Segment(
            "hybrid",
            0,
            matches_per_object=self.config.matches_per_object,
            positives_per_object=self.config.matches_per_object,
            weight=self.config.weight,
        )
        return append_segment(queries, [extra], segment)


def append_segment(queries: Queries, extra: list[Queries], segment: Segment) -> Queries:
    """Append `extra` to `queries` as the groups of one new segment.

    Args:
        extra: queries with one segment each; their proposals, if any, are appended likewise.
        segment: name and loss settings; size, groups and empty queries are taken from `extra`.
    """
    proposals = queries.proposals
    new = [one.proposals for one in extra if one.proposals is not None]
    if new:
        proposals = _join([proposals, *new], (*proposals.segments, _merge(new, segment)))
    return Queries(
        state=QueryState.cat([queries.state, *(one.state for one in extra)]),
        segments=(*queries.segments, _merge(extra, segment)),
        proposals=proposals,
        mask=queries.mask,
    )


def scale_match_weight(queries: Queries, weight: float) -> Queries:
    """Multiply the loss weight of the "match" segment, and of its proposals, by `weight`."""

    def scaled(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        return tuple(
            replace(s, weight=s.weight * weight) if s.name == "match" else s for s in segments
        )

    proposals = queries.proposals
    if proposals is not None:
        proposals = replace(proposals, segments=scaled(proposals.segments))
    return replace(queries, segments=scaled(queries.segments), proposals=proposals)


def _merge(parts: list[Queries] | list[Predictions], segment: Segment) -> Segment:
    """Complete `segment` with one group for each of `parts`, which have one segment each."""
    groups = [part.segments[0] for part in parts]
    return replace(
        segment,
        size=sum(group.size for group in groups),
        num_groups=len(groups),
        is_empty=_cat([group.is_empty for group in groups], axis=1),
    )


def _join(parts: list[Predictions], segments: tuple[Segment, ...]) -> Predictions:
    return Predictions(
        logits=_cat([part.logits for part in parts], axis=2),
        boxes=_cat([part.boxes for part in parts], axis=2),
        references=parts[0].references,
        segments=segments,
        is_class_agnostic=parts[0].is_class_agnostic,
        mask_embeddings=_cat([part.mask_embeddings for part in parts], axis=2),
        mask_features=parts[0].mask_features,
    )


def _cat(tensors: list[Tensor | None], axis: int) -> Tensor | None:
    return None if tensors[0] is None else torch.cat(tensors, dim=axis)
