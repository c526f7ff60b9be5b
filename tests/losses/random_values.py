"""Random targets and predictions for the tests of this folder."""

from __future__ import annotations

import torch

from dn_detr.structures import Predictions, Segment, Target, Targets, pad_targets

NUM_CLASSES = 5


def random_boxes(*shape: int, generator: torch.Generator, dtype=torch.float64):
    """cxcywh [*shape, 4] inside the image."""
    centre, size = torch.rand(2, *shape, 2, generator=generator, dtype=dtype)
    return torch.cat((0.2 + 0.6 * centre, 0.05 + 0.3 * size), dim=-1)


def random_targets(*counts: int, seed: int = 0, has_scores: bool = False, **options) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    return pad_targets(
        [
            Target(
                torch.randint(NUM_CLASSES, (count,), generator=generator),
                random_boxes(count, generator=generator),
                scores=(
                    0.1 + 0.9 * torch.rand(count, generator=generator, dtype=torch.float64)
                    if has_scores
                    else None
                ),
            )
            for count in counts
        ],
        **options,
    )


def random_predictions(
    *segments: Segment, layers: int = 2, batch: int = 3, seed: int = 1, **fields
) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    slots = sum(segment.size for segment in segments)
    shape = layers, batch, slots
    return Predictions(
        logits=2 * torch.randn(*shape, NUM_CLASSES, generator=generator, dtype=torch.float64),
        boxes=random_boxes(*shape, generator=generator),
        references=(None,) * layers,
        segments=segments,
        **fields,
    )


def random_mask(*shape: int, probability: float, seed: int = 2) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < probability
