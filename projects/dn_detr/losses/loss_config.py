"""Hyper-parameters of losses and matching costs, and what is built from them."""

from __future__ import annotations

from dataclasses import dataclass

from dn_detr.losses.criterion import Criterion
from dn_detr.losses.loss_terms import L1, Focal, GIoU, MatchabilityAware, Softmax
from dn_detr.losses.mask_costs import MaskCosts
from dn_detr.losses.mask_points import PointSampling
from dn_detr.losses.mask_terms import Dice, MaskCrossEntropy, MaskTerms
from dn_detr.losses.matching_costs import Costs
from dn_detr.protocols import LossTerm


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the loss and (cost_*) of the matching, as in DAB-DETR and its descendants."""

    # Class loss and matching cost: "focal"; "softmax", with an extra logit for "no object", whose
    # queries weigh no_object_weight (DETR); or "mal", the matchability-aware loss (DEIM,
    # 2412.04234) with the exponent mal_gamma, matched as with "focal".
    kind: str = "focal"
    mal_gamma: float = 1.5
    no_object_weight: float = 0.1
    class_weight: float = 1.0
    # 0 for both: the method predicts no boxes.
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    cost_class: float = 2.0
    cost_l1: float = 5.0
    cost_giou: float = 2.0
    # Focal loss: weight of positives, and exponent.
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    # Methods with masks: cross-entropy and Dice of masks, sampled at mask_points random points, of
    # which the fraction mask_importance are the most uncertain of mask_oversample times as many.
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    cost_mask: float = 5.0
    cost_dice: float = 5.0
    mask_points: int = 12544
    mask_oversample: float = 3.0
    mask_importance: float = 0.75

    def __post_init__(self) -> None:
        if self.kind not in ("focal", "mal", "softmax"):
            raise ValueError(
                f"kind of class loss must be one of ['focal', 'mal', 'softmax'], got {self.kind!r}"
            )
        if self.kind == "mal" and not self.has_boxes:
            raise ValueError(
                'class loss "mal" needs box IoU, but without a weight of L1 or GIoU no boxes are '
                "trained"
            )

    @property
    def has_boxes(self) -> bool:
        return bool(self.l1_weight or self.giou_weight)

    def costs(self) -> Costs:
        """The matching costs of classes and boxes."""
        return Costs(
            class_cost=self.cost_class,
            l1=self.cost_l1,
            giou=self.cost_giou,
            kind="softmax" if self.kind == "softmax" else "focal",
            alpha=self.focal_alpha,
            gamma=self.focal_gamma,
        )

    def costs_with_masks(self) -> MaskCosts:
        """The matching costs of classes, boxes and masks."""
        return MaskCosts(
            others=self.costs(),
            cross_entropy=self.cost_mask,
            dice=self.cost_dice,
            num_points=self.mask_points,
        )

    def criterion(self, masks: MaskTerms | None = None) -> Criterion:
        """The losses; masks: see `mask_terms`."""
        class_terms: dict[str, LossTerm] = {
            "focal": Focal(alpha=self.focal_alpha, gamma=self.focal_gamma),
            "mal": MatchabilityAware(gamma=self.mal_gamma),
            "softmax": Softmax(unmatched_weight=self.no_object_weight),
        }
        terms: dict[str, tuple[LossTerm, float]] = {
            "ce": (class_terms[self.kind], self.class_weight)
        }
        if self.has_boxes:
            terms |= {"bbox": (L1(), self.l1_weight), "giou": (GIoU(), self.giou_weight)}
        return Criterion(terms, masks=masks)

    def mask_terms(self, without: tuple[str, ...] = ()) -> MaskTerms:
        """The losses of masks; without: segments whose masks are not trained, e.g. ("dn",)."""
        return MaskTerms(
            terms={
                "mask": (MaskCrossEntropy(), self.mask_weight),
                "dice": (Dice(), self.dice_weight),
            },
            points=PointSampling(
                num_points=self.mask_points,
                oversample=self.mask_oversample,
                importance=self.mask_importance,
            ),
            without=without,
        )
