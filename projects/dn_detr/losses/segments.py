"""How matching and losses see predictions: one part for each segment, proposals included."""

from __future__ import annotations

from collections.abc import Collection

from dn_detr.structures import Predictions


def split_segments(
    predictions: Predictions, only: Collection[str] | None = None
) -> dict[str, Predictions]:
    """The predictions of each segment, as views; those of proposals under "encoder/<name>".

    only: names of the parts wanted; None = all. ValueError where there is no such part.
    """
    sources = {"": predictions}
    if predictions.proposals is not None:
        sources["encoder/"] = predictions.proposals
    names = [place + s.name for place, source in sources.items() for s in source.segments]
    if only is not None and set(only) - set(names):
        raise ValueError(f"there are no segments {sorted(set(only) - set(names))}, only {names}")
    return {
        place + segment.name: source.of(segment.name)
        for place, source in sources.items()
        for segment in source.segments
        if only is None or place + segment.name in only
    }
