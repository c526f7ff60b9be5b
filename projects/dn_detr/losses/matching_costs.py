"""Matching costs of queries and objects.

The T objects of a batch are concatenated over images, without padding. Each object is compared only
with the queries of its own image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dn_detr.layers.box_ops import at_least_float32, cxcywh_to_xyxy, elementwise_generalized_iou
from dn_detr.ops.extension import use_kernel
from dn_detr.ops.matching import matching_costs
from dn_detr.structures import Predictions, Targets


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of a batch without padding.

    image_of: [T] int64, ascending.
    labels: [T] int64.
    boxes: [T, 4] cxcywh in [0, 1].
    masks, noise_seeds: as in `Targets`.
    """

    image_of: Tensor
    labels: Tensor
    boxes: Tensor
    masks: tuple[Tensor, ...] | None
    noise_seeds: Tensor


def list_objects(targets: Targets) -> Objects:
    """List the objects of `targets`, without device synchronisation (`counts` is on the host)."""
    indices = targets.is_object.nonzero_static(size=sum(targets.counts))  # [T, 2]
    image_of, object_of = indices.unbind(1)
    return Objects(
        image_of=image_of.contiguous(),
        labels=targets.labels[image_of, object_of],
        boxes=targets.boxes[image_of, object_of],
        masks=targets.masks,
        noise_seeds=targets.noise_seeds,
    )


class MatchingCosts(Protocol):
    """The costs that the matcher minimizes."""

    def __call__(self, predictions: Predictions, objects: Objects) -> Tensor:
        """Return the cost of every query for every object of its image, [L, T, Q]."""


def focal_cost(
    logits: Tensor, image_of: Tensor, labels: Tensor, alpha: float, gamma: float
) -> Tensor:
    """Compute positive minus negative focal loss (2010.04159, code): [L, T, Q].

    With p the probability of the object's class, this is
    alpha (1 - p)^gamma (-log p) - (1 - alpha) p^gamma (-log(1 - p)).

    Args:
        logits: [L, B, Q, K].
        image_of, labels: [T] int64.
    """
    logits = at_least_float32(logits.transpose(2, 3)[:, image_of, labels])  # [L, T, Q]
    return alpha * focal_penalty(-logits, gamma) - (1 - alpha) * focal_penalty(logits, gamma)


def focal_penalty(logits: Tensor, gamma: float) -> Tensor:
    """Compute p^gamma (-log(1 - p)) for p = sigmoid(logits), elementwise: [...] -> [...].

    The focal loss (1708.02002) of negatives, or of positives with negated logits. Numerically
    stable for logits of any size.
    """
    loss = F.softplus(logits)
    return torch.exp(gamma * (logits - loss)) * loss  # softplus(-x) = softplus(x) - x


def softmax_cost(logits: Tensor, image_of: Tensor, labels: Tensor) -> Tensor:
    """Compute minus the softmax probability of the object's class (2005.12872): [L, T, Q].

    Args:
        logits: [L, B, Q, K], the last class being "no object".
        image_of, labels: [T] int64.
    """
    probabilities = at_least_float32(logits).softmax(-1)
    return -probabilities.transpose(2, 3)[:, image_of, labels]


def l1_cost(boxes: Tensor, image_of: Tensor, object_boxes: Tensor) -> Tensor:
    """Compute the L1 distance [L, T, Q] of boxes [L, B, Q, 4] to object_boxes [T, 4], cxcywh."""
    boxes = at_least_float32(boxes)[:, image_of]  # [L, T, Q, 4]
    return (boxes - object_boxes[:, None]).abs().sum(-1)


def giou_cost(boxes: Tensor, image_of: Tensor, object_boxes: Tensor) -> Tensor:
    """Compute minus the generalized IoU [L, T, Q] of boxes [L, B, Q, 4] and object_boxes [T, 4]."""
    boxes_xyxy = cxcywh_to_xyxy(boxes)[:, image_of]  # [L, T, Q, 4]
    return -elementwise_generalized_iou(boxes_xyxy, cxcywh_to_xyxy(object_boxes)[:, None])


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Weighted sum of class, L1 and GIoU costs; any callable of this signature may replace it.

    Args:
        class_cost, l1, giou: weights (2, 5, 2 with focal loss; 1, 5, 2 in DETR). If l1 and giou
            are 0, predictions need no boxes.
        kind: "focal" or "softmax".
        alpha, gamma: of the focal cost.
    """

    class_cost: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    kind: str = "focal"
    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in ("focal", "softmax"):
            raise ValueError(f'kind of class cost must be "focal" or "softmax", got {self.kind!r}')

    def __call__(self, predictions: Predictions, objects: Objects) -> Tensor:
        """Compute the cost of each object and query of its image: [L, T, Q], float32 or float64.

        Not differentiable. Falls back to `compute_pytorch` without the compiled operator.
        """
        logits, boxes = predictions.logits.detach(), predictions.boxes
        if boxes is None or not use_kernel("matching_costs", logits.device):
            return self.compute_pytorch(logits, boxes, objects)
        boxes = boxes.detach()
        dtype = torch.promote_types(at_least_float32(logits).dtype, boxes.dtype)
        return matching_costs(
            logits.to(dtype),
            boxes.to(dtype),
            objects.image_of,
            objects.labels,
            objects.boxes.to(dtype),
            class_cost=self.class_cost,
            l1=self.l1,
            giou=self.giou,
            is_softmax=self.kind == "softmax",
            alpha=self.alpha,
            gamma=self.gamma,
        )

    def compute_pytorch(self, logits: Tensor, boxes: Tensor | None, objects: Objects) -> Tensor:
        """Reference implementation: logits [L, B, Q, K], boxes [L, B, Q, 4] -> [L, T, Q]."""
        image_of, labels = objects.image_of, objects.labels
        if self.kind == "focal":
            class_cost = focal_cost(logits, image_of, labels, self.alpha, self.gamma)
        else:
            class_cost = softmax_cost(logits, image_of, labels)
        if self.l1 == self.giou == 0:
            return self.class_cost * class_cost
        if boxes is None:
            raise ValueError(
                "predictions without boxes need L1 and GIoU costs of 0, got "
                f"{self.l1} and {self.giou}"
            )
        return (
            self.class_cost * class_cost
            + self.l1 * l1_cost(boxes, image_of, objects.boxes)
            + self.giou * giou_cost(boxes, image_of, objects.boxes)
        )
