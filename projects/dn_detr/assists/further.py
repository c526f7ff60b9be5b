"""Further matched queries at the end of the query axis: what Group DETR and H-DETR share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dn_detr.structures import Predictions, Queries, QueryState, Segment


def append(queries: Queries, further: list[Queries], segment: Segment) -> Queries:
    """`queries`, then those of `further` as groups of one new segment.

    segment: its name, weight, copies and repeats; size, groups and empty slots follow from
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
        pixel_map=parts[0].pixel_map,
    )


def _cat(tensors: list[Tensor | None], axis: int) -> Tensor | None:
    return None if tensors[0] is None else torch.cat(tensors, dim=axis)
