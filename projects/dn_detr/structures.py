"""Data types passed between subpackages: every arrow of ARCHITECTURE.md is one of them.

All are frozen: made in one place and only read afterwards. Constructors check shapes, dtypes and
devices, but not values, because a value check waits for the GPU and breaks a compiled graph.
`Target` checks values, while they are still on the host.

Capital letters mean the same everywhere: B images, Q queries, K classes, C channels, L predictions
(decoder layers), S memory tokens, R reference width, M most objects in an image.
Boxes are cxcywh in [0, 1] of the unpadded image; padding masks are True where there is padding.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


def _check(
    value: Tensor,
    name: str,
    shape: tuple[int | None, ...],
    *,
    integer: bool = False,
    boolean: bool = False,
) -> None:
    """Raise ValueError unless `value` has `shape` (None: any size) and the requested kind of
    dtype.
    """
    sizes_fit = len(shape) == value.dim() and all(
        want is None or got == want for got, want in zip(value.shape, shape, strict=True)
    )
    if not sizes_fit:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be [{wanted}], got {list(value.shape)}")
    if boolean and value.dtype != torch.bool:
        raise ValueError(f"{name} must be bool, got {value.dtype}")
    if integer and value.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {value.dtype}")
    if not (boolean or integer) and not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {value.dtype}")


# ---------------------------------------------------------------------------------- ground truth


@dataclass(frozen=True, eq=False)
class Target:
    """The objects of one image, on the host. The only type whose values are checked.

    Attributes:
        labels: [n] int64, >= 0.
        boxes: [n, 4] cxcywh in [0, 1] of the unpadded image, finite, width and height > 0.
        masks: [n, H, W] bool, or None.
        scores: [n] in (0, 1], a teacher's confidence, or None.
        noise_seed: made from (seed, iteration, image id); all denoising noise follows from it.
    """

    labels: Tensor
    boxes: Tensor
    masks: Tensor | None = None
    scores: Tensor | None = None
    noise_seed: int = 0

    def __post_init__(self) -> None:
        count = self.labels.shape[0]
        _check(self.labels, "labels", (count,), integer=True)
        _check(self.boxes, "boxes", (count, 4))
        if count and not bool(torch.isfinite(self.boxes).all()):
            raise ValueError(f"boxes must be finite, got {self.boxes.tolist()}")
        if count and not bool((self.boxes[:, 2:] > 0).all()):
            raise ValueError(f"boxes must have width and height > 0, got {self.boxes.tolist()}")
        if count and bool((self.labels < 0).any()):
            raise ValueError(f"labels must be >= 0, got {self.labels.tolist()}")
        if self.masks is not None:
            _check(self.masks, "masks", (count, None, None), boolean=True)
        if self.scores is not None:
            _check(self.scores, "scores", (count,))
            if count and not bool(((self.scores > 0) & (self.scores <= 1)).all()):
                raise ValueError(f"scores must be in (0, 1], got {self.scores.tolist()}")


@dataclass(frozen=True, eq=False)
class Targets:
    """The objects of a batch, padded to M >= 1 per image by `pad_targets`.

    Attributes:
        labels: [B, M] int64, 0 where there is no object.
        boxes: [B, M, 4] cxcywh in [0, 1], (.5, .5, .5, .5) where there is no object.
        is_object: [B, M] bool, True first.
        noise_seeds: [B] int64.
        counts: number of objects of each image, on the host; only for the matcher and mask losses,
            never read inside the model.
        scores: [B, M], or None.
        masks: B tensors [n_b, H, W] bool (ragged), or None.
    """

    labels: Tensor
    boxes: Tensor
    is_object: Tensor
    noise_seeds: Tensor
    counts: tuple[int, ...]
    scores: Tensor | None = None
    masks: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        batch, most = self.labels.shape
        _check(self.labels, "labels", (batch, most), integer=True)
        _check(self.boxes, "boxes", (batch, most, 4))
        _check(self.is_object, "is_object", (batch, most), boolean=True)
        _check(self.noise_seeds, "noise_seeds", (batch,), integer=True)
        if self.scores is not None:
            _check(self.scores, "scores", (batch, most))

    def to(self, device: torch.device | str) -> Targets:
        """Return a copy on `device`; `counts` stays on the host."""

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        moved = {f.name: move(getattr(self, f.name)) for f in fields(self)}
        if self.masks is not None:
            moved["masks"] = tuple(move(mask) for mask in self.masks)
        return Targets(**moved)


def pad_targets(targets: list[Target], multiple_of: int = 1) -> Targets:
    """Join the targets of a batch.

    Args:
        targets: one for each image.
        multiple_of: M, the largest number of objects and at least 1, is rounded up to a multiple of
            it. 1 gives the published numbers of denoising groups, 8 few distinct shapes.

    Raises:
        ValueError: for an empty list, or if only some targets have scores or masks.
    """
    if not targets:
        raise ValueError("pad_targets needs at least one image, got none")
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be >= 1, got {multiple_of}")
    counts = tuple(target.labels.shape[0] for target in targets)
    most = -(-max(1, *counts) // multiple_of) * multiple_of
    batch, like = len(targets), targets[0].boxes
    labels = torch.zeros(batch, most, dtype=torch.int64, device=like.device)
    boxes = like.new_full((batch, most, 4), 0.5)
    is_object = torch.zeros(batch, most, dtype=torch.bool, device=like.device)
    has_scores = [target.scores is not None for target in targets]
    has_masks = [target.masks is not None for target in targets]
    if len(set(has_scores)) > 1 or len(set(has_masks)) > 1:
        raise ValueError("either all or none of the targets must have scores (and masks)")
    scores = like.new_ones((batch, most)) if has_scores[0] else None
    for i, (target, count) in enumerate(zip(targets, counts, strict=True)):
        labels[i, :count] = target.labels
        boxes[i, :count] = target.boxes
        is_object[i, :count] = True
        if scores is not None:
            scores[i, :count] = target.scores  # type: ignore[assignment]
    return Targets(
        labels=labels,
        boxes=boxes,
        is_object=is_object,
        noise_seeds=torch.tensor([t.noise_seed for t in targets], device=like.device),
        counts=counts,
        scores=scores,
        masks=tuple(t.masks for t in targets) if has_masks[0] else None,  # type: ignore[misc]
    )


@dataclass(frozen=True, eq=False)
class NoisedObjects:
    """Noised copies of the ground truth for T queries (`ops.noise_objects`).

    Attributes:
        labels: [B, T] int64.
        boxes: [B, T, 4] cxcywh in [0, 1].
        assignment: [B, T] int64, the object to reconstruct, -1: background.
        is_empty: [B, T] bool, True where the query does not exist.
        num_groups: divides T.
    """

    labels: Tensor
    boxes: Tensor
    assignment: Tensor
    is_empty: Tensor
    num_groups: int

    def __post_init__(self) -> None:
        batch, queries = self.labels.shape
        _check(self.labels, "labels", (batch, queries), integer=True)
        _check(self.boxes, "boxes", (batch, queries, 4))
        _check(self.assignment, "assignment", (batch, queries), integer=True)
        _check(self.is_empty, "is_empty", (batch, queries), boolean=True)

    def segment(self, *, attends_to: tuple[str, ...] = (), trains_empty: bool = False) -> Segment:
        """Return the segment "dn" of these queries, whose assignment is the noised objects'."""
        return Segment(
            name="dn",
            size=self.labels.shape[1],
            num_groups=self.num_groups,
            attends_to=attends_to,
            assignment=self.assignment,
            is_empty=None if trains_empty else self.is_empty,
            positives_per_object=self.num_groups,
        )


# --------------------------------------------------------------------------------------- images


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """The encoder's input.

    Attributes:
        maps: [B, C, h, w] each, fine to coarse.
        padding: [B, h, w] bool each, True outside the image.
        strides: of each level, in pixels.
    """

    maps: tuple[Tensor, ...]
    padding: tuple[Tensor, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.maps) == len(self.padding) == len(self.strides):
            raise ValueError(
                f"maps, padding and strides must be of one length, got "
                f"{len(self.maps)}, {len(self.padding)} and {len(self.strides)}"
            )
        for level, (features, padding) in enumerate(zip(self.maps, self.padding, strict=True)):
            batch, _, height, width = features.shape
            _check(padding, f"padding[{level}]", (batch, height, width), boolean=True)


@dataclass(frozen=True, eq=False)
class MaskFeatures:
    """Mask features: a mask is the product of a query's embedding [C] and `features`.

    Attributes:
        features: [B, C, h, w].
        valid_sizes: [B, 2], (w, h) of the unpadded image in cells, fractions included.
    """

    features: Tensor
    valid_sizes: Tensor

    def __post_init__(self) -> None:
        batch = self.features.shape[0]
        _check(self.features, "features", (batch, None, None, None))
        _check(self.valid_sizes, "valid_sizes", (batch, 2))


@dataclass(frozen=True, eq=False)
class Memory:
    """Tokens of all levels, flattened fine to coarse; the same type before and after the encoder.

    Attributes:
        tokens: [B, S, C].
        position: [B, S, C], position encoding.
        padding: [B, S] bool, True outside the image.
        shapes: (h, w) of each level as integers on the host; the sum of h * w is S.
        valid_sizes: [B, levels, 2], (w, h) of the unpadded part in cells.
        mask_features: of methods that predict masks, after the encoder.
    """

    tokens: Tensor
    position: Tensor
    padding: Tensor
    shapes: tuple[tuple[int, int], ...]
    valid_sizes: Tensor
    mask_features: MaskFeatures | None = None

    def __post_init__(self) -> None:
        batch, tokens, channels = self.tokens.shape
        _check(self.position, "position", (batch, tokens, channels))
        _check(self.padding, "padding", (batch, tokens), boolean=True)
        _check(self.valid_sizes, "valid_sizes", (batch, len(self.shapes), 2))


# -------------------------------------------------------------------------------------- queries


@dataclass(frozen=True, eq=False)
class QueryState:
    """The queries that enter the decoder.

    Attributes:
        content: [B, Q, C].
        position: [B, Q, C] a learned vector; None where it follows from the reference.
        reference: [B, Q, R] in [0, 1] of the unpadded image, R = 2 for points, 4 for boxes; h * w
            mask logits in Mask2Former; None without references.
    """

    content: Tensor
    position: Tensor | None
    reference: Tensor | None

    def __post_init__(self) -> None:
        batch, queries, channels = self.content.shape
        if self.position is not None:
            _check(self.position, "position", (batch, queries, channels))
        if self.reference is not None:
            _check(self.reference, "reference", (batch, queries, None))

    @staticmethod
    def cat(states: list[QueryState]) -> QueryState:
        """Join along the query axis.

        Raises:
            ValueError: if only some states have a position, or a reference.
        """

        def join(name: str) -> Any:
            parts = [getattr(state, name) for state in states]
            if any(part is None for part in parts):
                if not all(part is None for part in parts):
                    raise ValueError(f"either all or none of the query states must have {name}")
                return None
            return torch.cat(parts, dim=1)

        return QueryState(join("content"), join("position"), join("reference"))


@dataclass(frozen=True, eq=False)
class Segment:
    """A range of queries that get their ground truth in the same way.

    Attributes:
        name: unique; also the suffix of its losses (none for "match").
        size: number of queries.
        num_groups: equal groups that do not attend to each other.
        attends_to: names of other segments whose queries (of all groups) it attends to.
        assignment: [B, size] int64, the object that a query must reconstruct, -1: background; None:
            the matcher decides.
        is_empty: [B, size] bool, True where the query does not exist: no key, no loss, no match.
        matches_per_object: within one group (H-DETR, 2207.13080).
        positives_per_object: queries of an object in the whole segment, part of the loss
            normalizer.
        weight: factor on all its losses.
        ignored_objects: [B, M] bool; a query matched to one of these is trained as background.
    """

    name: str
    size: int
    num_groups: int = 1
    attends_to: tuple[str, ...] = ()
    assignment: Tensor | None = None
    is_empty: Tensor | None = None
    matches_per_object: int = 1
    positives_per_object: float = 1.0
    weight: float = 1.0
    ignored_objects: Tensor | None = None

    def __post_init__(self) -> None:
        if self.num_groups < 1 or self.size % self.num_groups:
            raise ValueError(
                f"segment {self.name!r}: num_groups must divide size {self.size}, "
                f"got {self.num_groups}"
            )
        if self.assignment is not None:
            _check(self.assignment, f"{self.name}.assignment", (None, self.size), integer=True)
        if self.is_empty is not None:
            _check(self.is_empty, f"{self.name}.is_empty", (None, self.size), boolean=True)
        if self.ignored_objects is not None:
            _check(self.ignored_objects, f"{self.name}.ignored_objects", (None, None), boolean=True)


def check_segments(segments: tuple[Segment, ...], num_queries: int) -> None:
    """Raise ValueError unless the segments fill `num_queries` and their references are valid."""
    names = [segment.name for segment in segments]
    if len(set(names)) != len(names):
        raise ValueError(f"segment names must be unique, got {names}")
    total = sum(segment.size for segment in segments)
    if total != num_queries:
        raise ValueError(f"segments hold {total} queries, but there are {num_queries} queries")
    for segment in segments:
        unknown = set(segment.attends_to) - set(names)
        if unknown:
            raise ValueError(
                f"segment {segment.name!r} attends to {sorted(unknown)}, known are {names}"
            )


@dataclass(frozen=True, eq=False)
class Queries:
    """The decoder's input: queries, divided by segments in their order.

    Attributes:
        state: the queries.
        segments: fill the query axis.
        proposals: predictions of a two-stage encoder, or None.
        mask: [B or 1, 1, n, n], additive attention mask among the first n queries, those of
            segments that attend to others or are attended to, if the denoising operator has written
            it; None: it follows from the segments (`layers.query_attention.QueryAttentionMask`).
    """

    state: QueryState
    segments: tuple[Segment, ...]
    proposals: Predictions | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        queries = self.state.content.shape[1]
        check_segments(self.segments, queries)
        if self.mask is not None:
            _check(self.mask, "mask", (None, 1, self.mask.shape[-1], self.mask.shape[-1]))


# ------------------------------------------------------------------------------------- outcomes


@dataclass(frozen=True, eq=False)
class LayerOutput:
    """The output of one decoder layer.

    Attributes:
        logits: [B, Q, K]; None before the first prediction.
        boxes: [B, Q, 4] cxcywh in [0, 1]; None before the first prediction.
        reference: [B, Q, R], what the next layer attends with, detached between layers.
        base: [B, Q, R], what the next box is an offset from: the reference, or with gradient
            (DAB-DETR, DINO).
        mask_embeddings: [B, Q, C], or None.
    """

    logits: Tensor | None
    boxes: Tensor | None
    reference: Tensor | None
    base: Tensor | None
    mask_embeddings: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Predictions:
    """All predictions of all queries; L counts every prediction, also one before layer 0.

    Attributes:
        logits: [L, B, Q, K].
        boxes: [L, B, Q, 4] cxcywh in [0, 1], or None.
        references: L tensors [B, Q, R], detached, or None; the first is the initial one. (Widths
            may differ between layers, so they are not stacked.)
        segments: divide the query axis.
        proposals: predictions of a two-stage encoder (L = 1), or None.
        is_class_agnostic: all labels count as 0.
        mask_embeddings: [L, B, Q, C], with mask_features, or None.
        mask_features: a mask is their product with an embedding.
    """

    logits: Tensor
    boxes: Tensor | None
    references: tuple[Tensor | None, ...]
    segments: tuple[Segment, ...]
    proposals: Predictions | None = None
    is_class_agnostic: bool = False
    mask_embeddings: Tensor | None = None
    mask_features: MaskFeatures | None = None

    def __post_init__(self) -> None:
        layers, batch, queries, _ = self.logits.shape
        check_segments(self.segments, queries)
        if self.boxes is not None:
            _check(self.boxes, "boxes", (layers, batch, queries, 4))
        if len(self.references) != layers:
            raise ValueError(f"references must have {layers} entries, got {len(self.references)}")
        if (self.mask_embeddings is None) != (self.mask_features is None):
            raise ValueError(
                "either both or none of mask_embeddings and mask_features must be given"
            )
        if self.mask_embeddings is not None:
            channels = self.mask_features.features.shape[1]  # type: ignore[union-attr]
            _check(self.mask_embeddings, "mask_embeddings", (layers, batch, queries, channels))

    def segment(self, name: str) -> Segment:
        """Return the segment called `name`; ValueError if there is none."""
        for segment in self.segments:
            if segment.name == name:
                return segment
        names = [segment.name for segment in self.segments]
        raise ValueError(f"there is no segment {name!r}, only {names}")

    def of(self, *names: str) -> Predictions:
        """Return the predictions of some segments; those of one, and of all, are views."""
        segments = tuple(self.segment(name) for name in names)
        sizes = [segment.size for segment in self.segments]
        known = [segment.name for segment in self.segments]
        places = [known.index(name) for name in names]
        is_all = places == list(range(len(sizes)))

        def cut(value: Any, axis: int) -> Any:
            if value is None or is_all:
                return value
            every = value.split(sizes, axis)
            parts = [every[place] for place in places]
            return parts[0] if len(parts) == 1 else torch.cat(parts, axis)

        return Predictions(
            logits=cut(self.logits, 2),
            boxes=cut(self.boxes, 2),
            references=tuple(cut(reference, 1) for reference in self.references),
            segments=tuple(replace(segment, attends_to=()) for segment in segments),
            is_class_agnostic=self.is_class_agnostic,
            mask_embeddings=cut(self.mask_embeddings, 2),
            mask_features=self.mask_features,
        )


@dataclass(frozen=True, eq=False)
class Assignment:
    """The objects assigned to the queries of one segment.

    Attributes:
        object_of: [L, B, size] int64, -1: background.
        is_real: [B, size] bool, False where the query does not exist.
        is_bad: [L, B] bool, True where predictions are not finite and the matching means nothing;
            or None.
    """

    object_of: Tensor
    is_real: Tensor
    is_bad: Tensor | None = None

    def __post_init__(self) -> None:
        layers, batch, size = self.object_of.shape
        _check(self.object_of, "object_of", (layers, batch, size), integer=True)
        _check(self.is_real, "is_real", (batch, size), boolean=True)
        if self.is_bad is not None:
            _check(self.is_bad, "is_bad", (layers, batch), boolean=True)

    def positive_slots(self, limit: int) -> Tensor:
        """Return the queries with an object, in order: [L, B, limit] int64.

        Padded by other queries (whose object_of is -1); does not synchronize with the device.

        Args:
            limit: at most `size`.
        """
        return torch.argsort(self.object_of < 0, dim=-1, stable=True)[..., :limit]


Assignments = dict[str, Assignment]
"""Segment name -> Assignment; segments of proposals are named "encoder/<name>"."""


@dataclass(frozen=True, eq=False)
class MaskPoints:
    """Predicted and true masks of the queries with an object, at P points of their image.

    Attributes:
        logits: [L, B, n, P].
        labels: [L, B, n, P] in [0, 1].
        is_positive: [L, B, n] bool, False where there are fewer such queries than n.
        scores: [L, B, n], of the target, or None: all are 1.
    """

    logits: Tensor
    labels: Tensor
    is_positive: Tensor
    scores: Tensor | None


@dataclass(frozen=True, eq=False)
class Matched:
    """The input of every loss term: n segments, all layers, with their ground truth.

    Attributes:
        logits: [L, B, q, K].
        boxes: [L, B, q, 4] cxcywh in [0, 1], or None.
        labels: [L, B, q] int64 of the assigned object (of object 0 where there is none: select with
            is_positive), like target_boxes [L, B, q, 4].
        target_scores: [L, B, q], or None: all are 1.
        is_positive: [L, B, q] bool, True where an object is assigned.
        is_real: [L, B, q] bool, False where the query does not exist.
        sizes: of the segments, which divide the query axis.
        positives_per_object: of the segments, [n]; part of the normalizer.
    """

    logits: Tensor
    boxes: Tensor | None
    labels: Tensor
    target_boxes: Tensor
    target_scores: Tensor | None
    is_positive: Tensor
    is_real: Tensor
    sizes: tuple[int, ...]
    positives_per_object: Tensor
