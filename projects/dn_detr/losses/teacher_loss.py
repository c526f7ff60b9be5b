"""What other detectors saw, as a second set of targets (Teach-DETR, 2211.11953, sec. 3)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from dn_detr.losses.criterion import Criterion
from dn_detr.losses.loss_terms import L1, Focal, GIoU, Softmax
from dn_detr.losses.matcher import assign
from dn_detr.losses.matching_costs import Costs
from dn_detr.structures import Predictions, Targets


@dataclass(frozen=True, kw_only=True)
class Teach:
    """Hyper-parameters of Teach-DETR (2211.11953)."""

    # Factor on all these losses (lambda in the paper).
    weight: float = 1.0
    # Factor on the class loss of queries without a teacher's box.
    unmatched_weight: float = 0.5
    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0


class Teaching:
    """Losses of the matched queries against boxes of a teacher, beside those of the ground truth.

    The same predictions are matched once more, in every layer on its own, now with the teacher's
    boxes. A box weighs as much as its score s: the class loss of the slot that is matched with it is
    multiplied by s, those of the others by `unmatched_weight`; L1 by s; GIoU too, s (1 - GIoU).
    Nothing is added to the model. Keys are "loss_ce_teacher" and so on.

    The authors' code has 1 - s GIoU in the last term, whose gradient is the same; here a box with
    score 0 costs nothing, as in the other terms. Of several teachers the paper adds up the losses,
    its code merges their boxes to one set; here the latter, before the training
    (`tools/make_teacher_boxes.py`). Proposals of two-stage pages, which the authors' code teaches
    too, learn from the ground truth alone.

    Args:
        config: the weights.
        costs: of the matching, for boxes alone; their kind is that of the class loss, too.
        no_object_weight: with softmax, of queries without object; multiplied by
            `config.unmatched_weight`.
        segments: names of those that learn from the teacher; the others, and proposals, only learn
            from the ground truth. With Group DETR these are all groups, over which losses are a
            mean; of H-DETR's the authors teach the one-to-one queries alone.
    """

    def __init__(
        self,
        config: Teach,
        *,
        costs: Costs,
        no_object_weight: float = 0.1,
        segments: Collection[str] = ("match",),
    ):
        if costs.l1 == costs.giou == 0:
            raise ValueError("a teacher's boxes can only teach a detector that predicts boxes")
        self.costs = costs
        self.segments = tuple(segments)
        weight = config.weight
        self.criterion = Criterion(
            {
                "ce": (
                    Softmax(unmatched_weight=no_object_weight * config.unmatched_weight)
                    if costs.kind == "softmax"
                    else Focal(
                        alpha=costs.alpha,
                        gamma=costs.gamma,
                        unmatched_weight=config.unmatched_weight,
                    ),
                    weight * config.class_weight,
                ),
                "bbox": (L1(), weight * config.l1_weight),
                "giou": (GIoU(), weight * config.giou_weight),
            },
            suffix="teacher",
            segments=self.segments,
        )

    def __call__(
        self, predictions: Predictions, boxes: Targets, num_boxes: float | Tensor
    ) -> dict[str, Tensor]:
        """Scalar losses, as `Criterion` says. boxes: the teacher's, with scores. num_boxes: of the
        batch, averaged over the processes and at least 1."""
        assignments = assign(predictions, boxes, self.costs, only=self.segments)
        return self.criterion(predictions, boxes, assignments, num_boxes)
