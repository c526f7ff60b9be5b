"""Attention between segments against a loop over queries and keys."""

from __future__ import annotations

import pytest
import torch

from dn_detr.layers.query_attention import QueryAttentionMask, attend
from dn_detr.structures import Segment

HEADS = 2


def loop(q, k, v, sees):
    """Attention written out, with `sees` (batch, i, j) -> bool."""
    batch, queries, channels = q.shape
    width = channels // HEADS
    out = torch.zeros_like(v)
    for b in range(batch):
        for h in range(HEADS):
            part = slice(h * width, (h + 1) * width)
            for i in range(queries):
                keys = [j for j in range(queries) if sees(b, i, j)]
                scores = torch.stack([q[b, i, part] @ k[b, j, part] for j in keys])
                weights = (scores / width**0.5).softmax(0)
                values = torch.stack([v[b, j, part] for j in keys])
                out[b, i, part] = (weights[:, None] * values).sum(0)
    return out


def places(segments):
    """(segment, group) of every slot."""
    return [
        (segment, slot // (segment.size // segment.num_groups))
        for segment in segments
        for slot in range(segment.size)
    ]


IS_EMPTY = torch.tensor([[False, True, False, True], [False, False, False, False]])
CASES = {
    "matched only": (Segment("match", 5),),
    "denoising": (
        Segment("dn", 4, num_groups=2, attends_to=("match",), is_empty=IS_EMPTY),
        Segment("match", 3),
    ),
    "denoising and groups": (
        Segment("dn", 4, num_groups=2, attends_to=("match",)),
        Segment("match", 3),
        Segment("group", 6, num_groups=2),
    ),
    "empty matched slots": (Segment("match", 4, is_empty=IS_EMPTY),),
    "denoising that sees the groups": (
        Segment("dn", 2, attends_to=("match", "group")),
        Segment("match", 3),
        Segment("group", 6, num_groups=2),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_query_attends_to_what_its_segment_may_see(case):
    segments = CASES[case]
    where = places(segments)
    empty = [
        s.is_empty if s.is_empty is not None else torch.zeros(2, s.size).bool() for s in segments
    ]
    empty = torch.cat(empty, dim=1)

    def sees(b, i, j):
        if i == j:
            return True
        (mine, group), (theirs, other) = where[i], where[j]
        same = mine is theirs and group == other
        return (same or theirs.name in mine.attends_to) and not bool(empty[b, j])

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, len(where), 8, dtype=torch.float64)
    query_mask = QueryAttentionMask(segments, device=q.device, dtype=q.dtype)
    torch.testing.assert_close(attend(q, k, v, HEADS, query_mask), loop(q, k, v, sees))


def test_isolated_segments_are_folded_and_need_no_mask():
    query_mask = QueryAttentionMask(
        CASES["denoising and groups"], device="cpu", dtype=torch.float32
    )
    (_, size, _, mask), (start, _, groups, no_mask) = query_mask.parts
    assert (size, mask.shape[-1]) == (7, 7)
    assert (start, groups, no_mask) == (7, 2, None)


def test_isolated_segments_must_come_last():
    segments = (Segment("group", 2), Segment("dn", 2, attends_to=("match",)), Segment("match", 2))
    with pytest.raises(ValueError, match="must come last"):
        QueryAttentionMask(segments, device="cpu", dtype=torch.float32)
