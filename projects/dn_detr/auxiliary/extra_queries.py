"""Extra matched queries in training: Group DETR (2207.13085) and H-DETR (2207.13080).

Group DETR: K - 1 extra groups of learned queries go through the same decoder. GroupQueries do not see each
other, and each is matched one-to-one on its own; the loss is the mean over the groups. In two-stage
models each group selects among proposals of its own head.

H-DETR (sec. 3.2): T extra queries go through the same decoder; neither set sees the other. In the
second set each object is matched to `matches_per_object` queries. In two-stage models it takes the proposals
that rank next after those of the first set.

Inference uses the first group, or set, alone. The extra parameters belong to the modules here, so that
the plain model has none of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dn_detr.structures import Predictions, Queries, QueryState, Segment, Targets


class GroupQueries(nn.Module):
    """Appends a "group" segment of num_groups - 1 groups of `num_queries` (11 groups in the paper).

    Owns what these groups learn (`query_design.new_parameters`), so that the plain model has none of it.
    """

    def __init__(self, *, query_design: nn.Module, num_queries: int, num_groups: int):
        super().__init__()
        if num_groups < 2:
            raise ValueError(f"num_groups must be at least 2, got {num_groups}")
        self.learned = nn.ModuleList(
            query_design.new_parameters(num_queries) for _ in range(num_groups - 1)
        )

    def forward(self, queries: Queries, source, targets: Targets) -> Queries:
        """source: has `queries(learned) -> Queries`."""
        further = [source.queries(learned) for learned in self.learned]
        share = 1 / (1 + len(further))
        segment = Segment("group", 0, positives_per_object=len(further), weight=1 - share)
        return append(weigh_match(queries, share), further, segment)


class HybridQueries(nn.Module):
    """Appends a "hybrid" segment of `num_queries` (T; 1500) with `matches_per_object` matches an object (K; 6).

    weight: of its losses (lambda; 1). Owns what these queries learn (`query_design.new_parameters`).
    """

    def __init__(
        self,
        *,
        query_design: nn.Module,
        num_queries: int,
        matches_per_object: int,
        weight: float = 1.0,
    ):
        super().__init__()
        if num_queries < 1 or matches_per_object < 1:
            raise ValueError(
                "hybrid matching needs at least 1 query and 1 repeat, got "
                f"{num_queries} and {matches_per_object}"
            )
        self.matches_per_object = matches_per_object
        self.weight = weight
        self.learned = query_design.new_parameters(num_queries, own_head=False)

    def forward(self, queries: Queries, source, targets: Targets) -> Queries:
        """source: has `queries(learned, first_rank) -> Queries`."""
        match = next(segment for segment in queries.segments if segment.name == "match")
        further = source.queries(self.learned, first_rank=match.size)
        segment = Segment(
            "hybrid",
            0,
            matches_per_object=self.matches_per_object,
            positives_per_object=self.matches_per_object,
            weight=self.weight,
        )
        return append(queries, [further], segment)


def append(queries: Queries, further: list[Queries], segment: Segment) -> Queries:
    """`queries`, then those of `further` as groups of one new segment.

    segment: its name, weight, copies and matches_per_object; size, groups and empty slots follow from
    `further`. Proposals, where `further` has any, become a segment of the same kind.
    """
    proposals = queries.proposals
    new = [one.proposals for one in further if one.proposals is not None]
    if new:
        proposals = _join([proposals, *new], (*proposals.segments, _merge(new, segment)))
    return Queries(
        state=QueryState.cat([queries.state, *(one.state for one in further)]),
        segments=(*queries.segments, _merge(further, segment)),
        proposals=proposals,
        mask=queries.mask,
    )


def weigh_match(queries: Queries, weight: float) -> Queries:
    """`queries` with the losses of their "match" segment, and of its proposals, times `weight`."""

    def weighed(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        return tuple(
            replace(s, weight=s.weight * weight) if s.name == "match" else s for s in segments
        )

    proposals = queries.proposals
    if proposals is not None:
        proposals = replace(proposals, segments=weighed(proposals.segments))
    return replace(queries, segments=weighed(queries.segments), proposals=proposals)


def _merge(parts: list[Queries] | list[Predictions], segment: Segment) -> Segment:
    """The segment of equal groups whose slots are those of `parts`, each with one segment."""
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
