"""Joins a page with its content, its auxiliary queries and the numbers. Used by the Detectron2 adapter, the
examples and the tests alike."""

from __future__ import annotations

from dataclasses import dataclass

from dn_detr.auxiliary.box_prompts import RandomBoxPrompts
from dn_detr.auxiliary.denoising import (
    DenoisingQueries,
    FixedGroups,
    MaskDenoisingQueries,
    ObjectBudget,
)
from dn_detr.auxiliary.extra_queries import GroupQueries, HybridQueries
from dn_detr.layers.query_content import QueryContent
from dn_detr.losses.criterion import Criterion
from dn_detr.losses.loss_terms import L1, Focal, GIoU, MatchabilityAware, Softmax
from dn_detr.losses.mask_points import PointSampling
from dn_detr.losses.mask_terms import Dice, MaskCrossEntropy, MaskTerms
from dn_detr.methods import METHODS
from dn_detr.methods.mask2former import MaskQueries
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """How ground truth is noised (2203.01305, sec. 4.2 and 5.1).

    num_groups: fixed number of groups; 0: as many as fit into `max_objects`. is_contrastive: with
    a negative copy of each object (2203.03605, sec. 3.3).
    """

    num_groups: int = 5
    max_objects: int = 500
    box_noise: float = 0.4
    label_noise: float = 0.2
    is_contrastive: bool = False
    hides_empty: bool = True


@dataclass(frozen=True, kw_only=True)
class HybridMatching:
    """The one-to-many branch of H-DETR (2207.13080, sec. 4.1): further queries, how often each object
    is matched among them, and the weight of their losses."""

    num_queries: int = 1500
    matches_per_object: int = 6
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class BoxPrompting:
    """Which objects are given in training (2203.01305, TPAMI version, sec. 5.7): the share of images
    that have any, the share of them without label, and how far their boxes are noised."""

    probability: float = 0.5
    hidden_labels: float = 0.2
    box_noise: float = 0.1


def build_model(
    method: str,
    config: ModelConfig,
    *,
    in_channels: list[int],
    strides: list[int],
    denoising: Denoising | None = None,
    num_groups: int = 1,
    hybrid: HybridMatching | None = None,
    prompts: BoxPrompting | None = None,
) -> DETR:
    """The core of a detector: (features, padding, targets=None) -> Predictions.

    in_channels, strides: of the backbone's features, fine to coarse. num_groups: of Group DETR, 1 =
    none. Assists combine, except groups with hybrid matching.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}, only {sorted(METHODS)}")
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}")
    if num_groups > 1 and hybrid is not None:
        raise ValueError(
            "groups and hybrid matching exclude each other: both match every object several times, "
            f"among further queries of their own; got {num_groups} groups and {hybrid}"
        )
    content = QueryContent(
        channels=config.channels,
        num_classes=config.num_classes,
        has_labels=denoising is not None or prompts is not None,
        has_indicator=True,
    )
    model = METHODS[method](config, in_channels, strides, content)
    if denoising is not None:
        groups = (
            FixedGroups(num_groups=denoising.num_groups, max_objects=denoising.max_objects)
            if denoising.num_groups
            else ObjectBudget(max_objects=denoising.max_objects)
        )
        kind = (
            MaskDenoisingQueries
            if isinstance(model.query_design, MaskQueries)
            else DenoisingQueries
        )
        if kind is MaskDenoisingQueries and denoising.is_contrastive:
            raise ValueError(
                f"{method} is denoised by shifted masks; contrastive noise, which moves the sides of "
                "boxes, has no meaning there"
            )
        model.auxiliary.append(
            kind(
                num_classes=config.num_classes,
                groups=groups,
                box_noise=denoising.box_noise,
                label_noise=denoising.label_noise,
                is_contrastive=denoising.is_contrastive,
                hides_empty=denoising.hides_empty,
            )
        )
    if prompts is not None:
        if model.mask_head is not None:
            raise ValueError(f"{method} finds masks: only boxes can be given, not masks")
        if denoising is not None and not denoising.hides_empty:
            raise ValueError("given objects need the empty slots of denoising to be hidden")
        model.auxiliary.append(
            RandomBoxPrompts(
                num_classes=config.num_classes,
                probability=prompts.probability,
                hidden_labels=prompts.hidden_labels,
                box_noise=prompts.box_noise,
            )
        )
    if num_groups > 1:
        model.auxiliary.append(
            GroupQueries(
                query_design=model.query_design,
                num_queries=config.num_queries,
                num_groups=num_groups,
            )
        )
    if hybrid is not None:
        model.auxiliary.append(
            HybridQueries(
                query_design=model.query_design,
                num_queries=hybrid.num_queries,
                matches_per_object=hybrid.matches_per_object,
                weight=hybrid.weight,
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
    mal_gamma: float = 1.5,
    kind: str = "focal",
    no_object_weight: float = 0.1,
    masks: MaskTerms | None = None,
) -> Criterion:
    """Class, L1 and GIoU losses with the weights of DAB-DETR and its descendants.

    Without weights of L1 and GIoU (0), predictions need no boxes. kind: of the class loss, "focal",
    "mal" (matchability-aware) or "softmax" (of logits with a last column for "no object", whose
    slots weigh `no_object_weight`). masks: see `mask_terms`.
    """
    class_terms = {
        "focal": Focal(alpha=focal_alpha, gamma=focal_gamma),
        "mal": MatchabilityAware(gamma=mal_gamma),
        "softmax": Softmax(unmatched_weight=no_object_weight),
    }
    if kind not in class_terms:
        raise ValueError(f"kind of class loss must be one of {list(class_terms)}, got {kind!r}")
    has_boxes = l1_weight or giou_weight
    if kind == "mal" and not has_boxes:
        raise ValueError(
            'the class loss "mal" asks for the overlap of boxes, which are not trained without a '
            "weight of L1 or GIoU"
        )
    terms = {"ce": (class_terms[kind], class_weight)}
    if has_boxes:
        terms |= {"bbox": (L1(), l1_weight), "giou": (GIoU(), giou_weight)}
    return Criterion(terms, masks=masks)


def mask_terms(
    *,
    cross_entropy: float = 5.0,
    dice: float = 5.0,
    points: PointSampling | None = None,
    without: tuple[str, ...] = (),
) -> MaskTerms:
    """Losses of masks with the weights of Mask2Former and Mask DINO, for pages that predict masks.

    without: names of the segments whose masks are not trained, e.g. ("dn",).
    """
    return MaskTerms(
        terms={"mask": (MaskCrossEntropy(), cross_entropy), "dice": (Dice(), dice)},
        points=points or PointSampling(),
        without=without,
    )
