"""Box prompts: some objects are given, the matched queries detect the others (2203.01305, TPAMI
version, sec. 5.7).

Prompted boxes and labels become queries like noised ones, but the matched queries attend to them in
every layer. Training prompts a random subset of the objects of some images. As in the paper, these
are excluded from detection: a matched query assigned to one is trained as background. (The paper
prompts whole classes, this module single objects.)

Denoising queries attend to the matched queries, and so indirectly to the prompts in training; the
paper does not mask this either.

A box without a label uses the last row of the label embedding, "unknown".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dn_detr.ops import noise_objects
from dn_detr.ops.philox import PROMPT_DRAW, philox
from dn_detr.protocols import QuerySource
from dn_detr.structures import Queries, QueryState, Segment, Targets

PROMPT_NOISE = 0x2545F491  # XORed with the noise seed, so that prompts differ from denoising boxes


@dataclass(frozen=True, eq=False)
class PromptedObjects:
    """Prompts of a batch, padded to M.

    labels: [B, M] int64 in [0, K], where K means unknown.
    boxes: [B, M, 4] cxcywh in [0, 1].
    is_given: [B, M] bool, False for padding.
    """

    labels: Tensor
    boxes: Tensor
    is_given: Tensor


def add_prompts(queries: Queries, source: QuerySource, given: PromptedObjects) -> Queries:
    """Prepend a "prompt" segment of the given objects, visible to the matched queries.

    source provides `from_boxes(labels [B, M], boxes [B, M, 4]) -> QueryState`.
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

    def __post_init__(self) -> None:
        if not (0 < self.probability <= 1 and 0 <= self.hidden_labels <= 1 and self.box_noise >= 0):
            raise ValueError(
                "probability must be in (0, 1], hidden_labels in [0, 1] and box_noise >= 0, got "
                f"{self.probability}, {self.hidden_labels} and {self.box_noise}"
            )


class RandomBoxPrompts(nn.Module):
    """Prompt random objects of random images in training, determined by `targets.noise_seeds`.

    Everything random follows from `targets.noise_seeds`.
    """

    hides_labels = True

    def __init__(self, config: BoxPrompting, *, num_classes: int):
        super().__init__()
        self.config = config
        self.num_classes = num_classes

    def forward(self, queries: Queries, source: QuerySource, targets: Targets) -> Queries:
        """Add the prompts of a training batch; see `add_prompts`."""
        return add_prompts(queries, source, self.choose(targets))

    @torch.no_grad()
    def choose(self, targets: Targets) -> PromptedObjects:
        """Choose the prompts of a batch, [B, M], at the positions of their objects."""
        most = targets.labels.shape[1]
        key = targets.noise_seeds[:, None]
        index = torch.arange(most, device=key.device)[None]
        image_draw, share, *_ = (
            word.double() * 2.0**-32 for word in philox(key, (index[:, :1] * 0, 0, PROMPT_DRAW, 1))
        )
        object_draw, label_draw, *_ = (
            word.double() * 2.0**-32 for word in philox(key, (index, 0, PROMPT_DRAW, 0))
        )
        is_prompted = image_draw < self.config.probability
        is_given = targets.is_object & is_prompted & (object_draw < share)
        noised = noise_objects(
            targets.labels,
            targets.boxes,
            targets.is_object,
            targets.noise_seeds ^ PROMPT_NOISE,
            num_groups=1,
            slots_per_group=most,
            num_classes=self.num_classes,
            box_noise=self.config.box_noise,
            label_noise=0.0,
            contrastive=False,
            num_matched=0,
            mask_dtype=torch.float32,
        )
        labels = torch.where(
            label_draw < self.config.hidden_labels, self.num_classes, targets.labels
        )
        return PromptedObjects(labels, noised.boxes, is_given)
