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

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dn_detr.protocols import QueryDesign, QuerySource
from dn_detr.structures import Predictions, Queries, QueryState, Segment, Targets


class GroupQueries(nn.Module):
    """Appends a "group" segment of num_groups - 1 groups of `num_queries` (11 groups in the paper).

    Owns what these groups learn (`query_design.new_parameters`), so that the plain model has none of it.
    """

    hides_labels = False

    def __init__(self, *, query_design: QueryDesign, num_queries: int, num_groups: int):
        super().__init__()
        if num_groups < 2:
            raise ValueError(f"num_groups must be at least 2, got {num_groups}")
        self.learned = nn.ModuleList(
            query_design.new_parameters(num_queries)  # type: ignore[operator]
            for _ in range(num_groups - 1)
        )

    def forward(self, queries: Queries, source: QuerySource, targets: Targets) -> Queries:
        """source: has `queries(learned) -> Queries`."""
        further = [source.queries(learned) for learned in self.learned]
        share = 1 / (1 + len(further))
        segment = Segment("group", 0, positives_per_object=len(further), weight=1 - share)
        return append(weigh_match(queries, share), further, segment)


@dataclass(frozen=True, kw_only=True)
class HybridMatching:
    """Hyper-parameters of H-DETR's one-to-many branch (2207.13080, sec. 4.1)."""

    num_queries: int = 1500
    # Queries that each object is matched to.
    matches_per_object: int = 6
    # Factor on the losses of this branch.
    weight: float = 1.0


class HybridQueries(nn.Module):
    """Appends a "hybrid" segment of T queries with several matches an object.

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
        """source: has `queries(learned, first_rank) -> Queries`."""
        match = next(segment for segment in queries.segments if segment.name == "match")
        further = source.queries(self.learned, first_rank=match.size)
        segment = Segment(
            "hybrid",
            0,
            matches_per_object=self.config.matches_per_object,
            positives_per_object=self.config.matches_per_object,
            weight=self.config.weight,
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
