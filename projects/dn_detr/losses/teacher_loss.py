"""Boxes of teacher detectors as a second set of targets (Teach-DETR, 2211.11953, sec. 3)."""

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
    """Losses of the matched queries against the boxes of a teacher.

    The predictions of every layer are matched again, with the teacher's boxes. A box is weighted by
    its score s: the class loss of the matched query and the L1 loss are multiplied by s, the GIoU
    loss is s (1 - GIoU), and the class loss of unmatched queries is multiplied by
    `unmatched_weight`. The model does not change. Keys are "loss_ce_teacher" and so on.

    Deviations from the authors' code: theirs has 1 - s GIoU, with the same gradient; here a box of
    score 0 has loss 0, as in the other terms. Theirs also teaches the proposals of two-stage
    methods. With several teachers, the paper sums the losses; as in the code, their boxes are
    merged before training (`tools/make_teacher_boxes.py`).

    Args:
        config: weights of the terms.
        costs: matching costs for boxes; their kind selects the class loss.
        no_object_weight: with softmax, of queries without object; multiplied by
            `config.unmatched_weight`.
        segments: names of the segments to teach: with Group DETR all groups, whose losses are
            averaged; with H-DETR the authors teach only the one-to-one queries.
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
            raise ValueError("teacher boxes can only teach a detector that predicts boxes")
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
        """Compute the teacher losses, scalars []; see `Criterion`.

        Args:
            boxes: teacher boxes with scores [B, M].
            num_boxes: teacher boxes in the batch, averaged over processes and at least 1.
        """
        assignments = assign(predictions, boxes, self.costs, only=self.segments, raises=False)
        return self.criterion(predictions, boxes, assignments, num_boxes)
