"""Query denoising: DN-DETR (2203.01305) and its contrastive form (2203.03605, sec. 3.3).

Noised copies of the ground truth enter the decoder as extra queries that must reconstruct their
object. Each object has one query in every group (two with contrastive denoising: a positive that
reconstructs it and a negative that predicts background). A group attends to itself and to the
matched queries, which never attend to denoising queries, so that no ground truth leaks.

Deviation from the published code: the empty queries of images with fewer objects than the largest
in the batch are masked out as keys and not trained, so that the result for an image does not depend
on the other images in the batch (`DenoisingQueries.as_published`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dn_detr.layers.query_attention import attention_dtype
from dn_detr.ops import noise_objects
from dn_detr.protocols import MaskQuerySource, QuerySource
from dn_detr.structures import NoisedObjects, Queries, QueryState, Targets


@dataclass(frozen=True, kw_only=True)
class FixedGroups:
    """A fixed number of denoising groups (2203.01305: 5).

    At most `max_objects` noised objects per image bound the memory: in crowded images, each group
    contains a random subset of the objects.
    """

    num_groups: int = 5
    max_objects: int = 500

    def __post_init__(self) -> None:
        if not 1 <= self.num_groups <= self.max_objects:
            raise ValueError(
                "the number of denoising groups must be at least 1 and at most the number of "
                f"noised objects, got {self.num_groups} groups and {self.max_objects} objects"
            )

    def __call__(self, most_objects: int) -> tuple[int, int]:
        """(number of groups, objects in each) when the fullest image has `most_objects`."""
        return self.num_groups, min(most_objects, self.max_objects // self.num_groups)


@dataclass(frozen=True, kw_only=True)
class ObjectBudget:
    """As many groups as fit into `max_objects` noised objects, at least one (2203.03605: 100).

    Images with more objects use a random subset of them.
    """

    max_objects: int = 100

    def __post_init__(self) -> None:
        if self.max_objects < 1:
            raise ValueError(f"the denoising budget must be at least 1, got {self.max_objects}")

    def __call__(self, most_objects: int) -> tuple[int, int]:
        """(number of groups, objects in each) when the fullest image has `most_objects`."""
        return max(1, self.max_objects // most_objects), min(most_objects, self.max_objects)


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """Hyper-parameters of query denoising (2203.01305, sec. 4.2 and 5.1)."""

    # Groups, each a noised copy of all objects; 0: as many as fit into max_objects.
    num_groups: int = 5
    # At most this many noised objects an image, over all groups. In more crowded images each group
    # holds a random subset of the objects.
    max_objects: int = 500
    # Centers move by up to box_noise / 2 of the size, sizes change by up to the fraction box_noise.
    box_noise: float = 0.4
    # Probability that a label is replaced by a random one (which may be the same).
    label_noise: float = 0.2
    # Contrastive (DINO, 2203.03605, sec. 3.3): also a negative copy of each object, farther away,
    # that must predict background. The sides of the box then move, by up to box_noise half sizes
    # (negatives: up to twice that).
    contrastive: bool = False
    # Methods with masks: denoising queries also reconstruct masks, not only boxes.
    masks: bool = True

    def __post_init__(self) -> None:
        if self.box_noise < 0 or not 0 <= self.label_noise <= 1:
            raise ValueError(
                "box_noise must be >= 0 and label_noise in [0, 1], got "
                f"{self.box_noise} and {self.label_noise}"
            )


class DenoisingQueries(nn.Module):
    """Prepend a "dn" segment of noised ground truth, determined by `targets.noise_seeds`.

    The noise depends on `targets.noise_seeds` alone.

    trains_empty: As published, empty queries are trained as negatives (DINO, Mask DINO).
    """

    hides_labels = False
    as_published = False
    """Empty queries are visible, with a content of zero, and trained if `trains_empty`."""

    def __init__(self, config: Denoising, *, num_classes: int, trains_empty: bool = False):
        super().__init__()
        self.config = config
        self.trains_empty = trains_empty
        self.num_classes = num_classes
        self.groups: FixedGroups | ObjectBudget = ObjectBudget(max_objects=config.max_objects)
        if config.num_groups:
            self.groups = FixedGroups(num_groups=config.num_groups, max_objects=config.max_objects)

    def forward(self, queries: Queries, source: QuerySource, targets: Targets) -> Queries:
        """Prepend the denoising queries."""
        match = next(segment for segment in queries.segments if segment.name == "match")
        noised, mask = self.noise(
            targets, num_matched=match.size, mask_dtype=attention_dtype(queries.state.content)
        )
        state = self.describe(noised, source, targets)
        if self.as_published:
            content = state.content.masked_fill(noised.is_empty[..., None], 0)
            state = replace(state, content=content)
        # Without any object in the batch there are no denoising queries in their code.
        trains_empty = self.as_published and self.trains_empty and any(targets.counts)
        segment = noised.segment(attends_to=("match",), trains_empty=trains_empty)
        return Queries(
            state=QueryState.cat([state, queries.state]),
            segments=(segment, *queries.segments),
            proposals=queries.proposals,
            mask=mask if match.is_empty is None else hide_empty_matched(mask, match.is_empty),
        )

    def noise(
        self, targets: Targets, *, num_matched: int, mask_dtype: torch.dtype
    ) -> tuple[NoisedObjects, Tensor]:
        """Make T noised objects per image, see `ops.noise_objects`, and the additive attention mask
        [B or 1, 1, T + num_matched, T + num_matched] of denoising and matched queries.
        """
        num_groups, group_size = self.groups(targets.labels.shape[1])
        labels, boxes, assignment, is_empty, mask = noise_objects(
            targets.labels,
            targets.boxes,
            targets.is_object,
            targets.noise_seeds,
            num_groups=num_groups,
            slots_per_group=group_size,
            num_classes=self.num_classes,
            box_noise=self.config.box_noise,
            label_noise=self.config.label_noise,
            contrastive=self.config.contrastive,
            num_matched=num_matched,
            mask_dtype=mask_dtype,
            hide_empty=not self.as_published,
        )
        return NoisedObjects(labels, boxes, assignment, is_empty, num_groups), mask

    def describe(self, noised: NoisedObjects, source: QuerySource, targets: Targets) -> QueryState:
        """Make the state of the denoising queries, with content [B, T, C]."""
        return source.from_boxes(noised.labels, noised.boxes)


class MaskDenoisingQueries(DenoisingQueries):
    """Denoising for queries that start from a mask (2203.01305, TPAMI version, on Mask2Former).

    Shifted ground-truth masks must be reconstructed: a mask keeps its shape and size, and shifts
    like the box centre in box denoising. Targets must have masks. The source provides
    `from_masks(labels [B, T], masks, object_of [B, T], shift [B, T, 2]) -> QueryState`, with masks
    as in `Targets` and shift as a fraction of the image size.
    """

    def describe(  # type: ignore[override]
        self, noised: NoisedObjects, source: MaskQuerySource, targets: Targets
    ) -> QueryState:
        """See the base class."""
        if targets.masks is None:
            raise ValueError("mask denoising needs targets with masks, got None")
        object_of = noised.assignment.clamp(min=0)
        boxes = targets.boxes.gather(1, object_of[..., None].expand(-1, -1, 4))
        shift = noised.boxes[..., :2] - boxes[..., :2]
        shift = torch.where(noised.is_empty[..., None], 0, shift)
        return source.from_masks(noised.labels, targets.masks, object_of, shift)


def hide_empty_matched(mask: Tensor, is_empty: Tensor) -> Tensor:
    """Hide empty matched queries, the last N, from all queries but themselves.

    Args:
        mask: additive [B, 1, n, n], changed in place because its rows are aligned.
        is_empty: [B, N] bool.
    """
    size = mask.shape[-1]
    hidden = F.pad(is_empty, (size - is_empty.shape[1], 0))[:, None, None]
    itself = torch.eye(size, dtype=torch.bool, device=mask.device)
    return mask.masked_fill_(hidden & ~itself, -torch.inf)
