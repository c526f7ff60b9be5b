"""Prompted objects: some boxes of an image are given, the queries find the others (2203.01305, TPAMI
version, sec. 5.7).

Given boxes with their labels become queries as noised ones do, but nothing hides them: the matched
queries see them in every layer. In training a random subset of the objects of some images is given.
As in the paper these are not to be found again: a matched query that is assigned to one of them must
say nothing. (There whole classes are given or not; here single objects are.)

Denoising queries see the matched ones, and through them, in training, what is given; the paper has no
mask between the parts either.

Boxes may come without a label: their query has that of the label table's last row, "unknown".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dn_detr.ops import noise_objects
from dn_detr.ops.philox import philox
from dn_detr.protocols import QuerySource
from dn_detr.structures import Queries, QueryState, Segment, Targets

KNOWN_DRAW = 2  # of the generator: `ops.noise_objects` has 0 and 1
OTHER_NOISE = 0x2545F491  # changes a noise key, so that given boxes are not those of denoising


@dataclass(frozen=True, eq=False)
class PromptedObjects:
    """labels [B, M] int64 (the number of classes: unknown); boxes [B, M, 4]; is_given [B, M] bool,
    False where the slot has none."""

    labels: Tensor
    boxes: Tensor
    is_given: Tensor


def add_prompts(queries: Queries, source: QuerySource, given: PromptedObjects) -> Queries:
    """`queries` behind a "prompt" segment of the given objects, which they see.

    source: has `from_boxes(labels [B, M], boxes [B, M, 4]) -> QueryState`.
    """
    most = given.labels.shape[1]
    objects = torch.arange(most, device=given.labels.device)
    prompts = Segment(
        name="prompt",
        size=most,
        attends_to=("match",),
        assignment=torch.where(given.is_given, objects, -1),
        is_empty=~given.is_given,
    )
    others = (
        replace(s, attends_to=(*s.attends_to, "prompt"), ignored_objects=given.is_given)
        if s.name == "match"
        else s
        for s in queries.segments
    )
    return Queries(
        state=QueryState.cat([source.from_boxes(given.labels, given.boxes), queries.state]),
        segments=(prompts, *others),
        proposals=queries.proposals,
    )


@dataclass(frozen=True, kw_only=True)
class BoxPrompting:
    """Which objects are given in training (2203.01305, TPAMI version, sec. 5.7)."""

    # Fraction of the images with given objects; each object of these is then given with a
    # probability that is itself drawn from [0, 1).
    probability: float = 0.5
    # Fraction of the given objects without a label.
    hidden_labels: float = 0.2
    # Noise of the given boxes, as in denoising.
    box_noise: float = 0.1

    def __post_init__(self):
        if not (0 < self.probability <= 1 and 0 <= self.hidden_labels <= 1 and self.box_noise >= 0):
            raise ValueError(
                "probability must be in (0, 1], hidden_labels in [0, 1] and box_noise >= 0, got "
                f"{self.probability}, {self.hidden_labels} and {self.box_noise}"
            )


class RandomBoxPrompts(nn.Module):
    """In training, gives random objects of random images to the queries.

    Everything random follows from `targets.noise_seeds`.
    """

    hides_labels = True

    def __init__(self, config: BoxPrompting, *, num_classes: int):
        super().__init__()
        self.config = config
        self.num_classes = num_classes

    def forward(self, queries: Queries, source: QuerySource, targets: Targets) -> Queries:
        """source: see `add_prompts`."""
        return add_prompts(queries, source, self.choose(targets))

    @torch.no_grad()
    def choose(self, targets: Targets) -> PromptedObjects:
        """What is given of the objects of a batch, in their places."""
        most = targets.labels.shape[1]
        key = targets.noise_seeds[:, None]
        index = torch.arange(most, device=key.device)[None]
        is_asked, share, *_ = (
            word.double() * 2.0**-32 for word in philox(key, (index[:, :1] * 0, 0, KNOWN_DRAW, 1))
        )
        chance, hiding, *_ = (
            word.double() * 2.0**-32 for word in philox(key, (index, 0, KNOWN_DRAW, 0))
        )
        is_given = targets.is_object & (is_asked < self.config.probability) & (chance < share)
        noised = noise_objects(
            targets.labels,
            targets.boxes,
            targets.is_object,
            targets.noise_seeds ^ OTHER_NOISE,
            num_groups=1,
            slots_per_group=most,
            num_classes=self.num_classes,
            box_noise=self.config.box_noise,
            label_noise=0.0,
            contrastive=False,
            num_matched=0,
            mask_dtype=torch.float32,
        )
        labels = torch.where(hiding < self.config.hidden_labels, self.num_classes, targets.labels)
        return PromptedObjects(labels, noised.boxes, is_given)
