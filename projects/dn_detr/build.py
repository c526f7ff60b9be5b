"""Joins a page with its content, its assists and the numbers. Used by the Detectron2 adapter, the
examples and the tests alike."""

from __future__ import annotations

from dataclasses import dataclass

from dn_detr.assists.denoising import Denoise, FixedGroups, ObjectBudget
from dn_detr.layers.content import QueryContent
from dn_detr.losses.criterion import Criterion
from dn_detr.losses.terms import Focal, GIoU, L1
from dn_detr.methods import METHODS
from dn_detr.models.detr import DETR
from dn_detr.models.numbers import Numbers


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """How ground truth is noised (2203.01305, sec. 4.2 and 5.1).

    num_groups: fixed number of groups; 0: as many as fit into `max_objects`.
    """

    num_groups: int = 5
    max_objects: int = 500
    box_noise: float = 0.4
    label_noise: float = 0.2
    hides_empty: bool = True


def build_model(
    method: str,
    numbers: Numbers,
    *,
    in_channels: list[int],
    strides: list[int],
    denoising: Denoising | None,
) -> DETR:
    """The core of a detector: (features, padding, targets=None) -> Predictions.

    in_channels, strides: of the backbone's features, fine to coarse.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}, only {sorted(METHODS)}")
    content = QueryContent(
        channels=numbers.channels,
        num_classes=numbers.num_classes,
        has_labels=denoising is not None,
        has_indicator=True,
    )
    model = METHODS[method](numbers, in_channels, strides, content)
    if denoising is not None:
        groups = (
            FixedGroups(num_groups=denoising.num_groups, max_objects=denoising.max_objects)
            if denoising.num_groups
            else ObjectBudget(max_objects=denoising.max_objects)
        )
        model.assists.append(
            Denoise(
                num_classes=numbers.num_classes,
                groups=groups,
                box_noise=denoising.box_noise,
                label_noise=denoising.label_noise,
                hides_empty=denoising.hides_empty,
            )
        )
    return model


def build_criterion(
    *,
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
) -> Criterion:
    """Focal, L1 and GIoU losses with the weights of DAB-DETR and its descendants."""
    return Criterion(
        {
            "class": (Focal(alpha=focal_alpha, gamma=focal_gamma), class_weight),
            "box": (L1(), l1_weight),
            "giou": (GIoU(), giou_weight),
        }
    )
