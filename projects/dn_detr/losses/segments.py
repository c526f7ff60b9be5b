"""Split predictions into segments for matching and losses."""

from __future__ import annotations

from collections.abc import Collection

from dn_detr.structures import Predictions

ENCODER = "encoder/"
"""Prefix of the names of segments of proposals."""


def split_segments(
    predictions: Predictions, only: Collection[str] | None = None
) -> dict[str, Predictions]:
    """Split predictions into views of their segments.

    Args:
        only: names of the segments to return, None for all.

    Returns:
        Predictions by segment name, "encoder/<name>" for segments of proposals.

    Raises:
        ValueError: if there is no segment of a name in `only`.
    """
    sources = {"": predictions}
    if predictions.proposals is not None:
        sources[ENCODER] = predictions.proposals
    names = [place + s.name for place, source in sources.items() for s in source.segments]
    if only is not None and set(only) - set(names):
        raise ValueError(f"there are no segments {sorted(set(only) - set(names))}, only {names}")
    return {
        place + segment.name: source.of(segment.name)
        for place, source in sources.items()
        for segment in source.segments
        if only is None or place + segment.name in only
    }
