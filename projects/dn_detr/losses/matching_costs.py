"""What it costs to give a slot an object: the price that the matcher minimises.

All objects of a batch stand in one list of T, image after image; T is the true number of objects,
not the padded one. An object is only compared with the slots of its own image.
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
    """The objects of a batch without padding: image_of [T] int64, ascending; labels [T] int64;
    boxes [T, 4] cxcywh. masks and noise_seeds [B]: as in `Targets`."""

    image_of: Tensor
    labels: Tensor
    boxes: Tensor
    masks: tuple[Tensor, ...] | None
    noise_seeds: Tensor


def list_objects(targets: Targets) -> Objects:
    """Objects on the device of `targets`; their number comes from the host, nothing waits for a
    device."""
    places = targets.is_object.nonzero_static(size=sum(targets.counts))  # [T, 2]
    image_of, place_of = places.unbind(1)
    return Objects(
        image_of=image_of.contiguous(),
        labels=targets.labels[image_of, place_of],
        boxes=targets.boxes[image_of, place_of],
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
    """Focal loss of saying yes minus that of saying no (2010.04159, code): [L, T, Q].

    logits [L, B, Q, K]; image_of, labels [T] int64. With p the object's class probability:
    alpha (1 - p)^gamma (-log p) - (1 - alpha) p^gamma (-log(1 - p)).
    """
    logits = at_least_float32(logits.transpose(2, 3)[:, image_of, labels])  # [L, T, Q]
    return alpha * focal_penalty(-logits, gamma) - (1 - alpha) * focal_penalty(logits, gamma)


def focal_penalty(logits: Tensor, gamma: float) -> Tensor:
    """p^gamma (-log(1 - p)) for p = sigmoid(logits): the focal loss where the answer is no
    (1708.02002); with negated logits where it is yes. Exact for logits of any size."""
    return torch.exp(-gamma * F.softplus(-logits)) * F.softplus(logits)


def softmax_cost(logits: Tensor, image_of: Tensor, labels: Tensor) -> Tensor:
    """Minus the softmax probability of the object's class (2005.12872): [L, T, Q].

    logits [L, B, Q, K], the last class being "no object"; image_of, labels [T] int64.
    """
    probabilities = at_least_float32(logits).softmax(-1)
    return -probabilities.transpose(2, 3)[:, image_of, labels]


def l1_cost(boxes: Tensor, image_of: Tensor, object_boxes: Tensor) -> Tensor:
    """L1 distance of boxes [L, B, Q, 4] and object_boxes [T, 4], both cxcywh: [L, T, Q]."""
    boxes = at_least_float32(boxes)[:, image_of]  # [L, T, Q, 4]
    return (boxes - object_boxes[:, None]).abs().sum(-1)


def giou_cost(boxes: Tensor, image_of: Tensor, object_boxes: Tensor) -> Tensor:
    """Minus the generalized IoU of boxes [L, B, Q, 4] and object_boxes [T, 4]: [L, T, Q]."""
    boxes_xyxy = cxcywh_to_xyxy(boxes)[:, image_of]  # [L, T, Q, 4]
    return -elementwise_generalized_iou(boxes_xyxy, cxcywh_to_xyxy(object_boxes)[:, None])


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Weighted sum of class, L1 and GIoU costs; any callable of the same form may replace it.

    class_cost, l1, giou: weights (2, 5, 2 with focal loss; 1, 5, 2 in DETR); kind: "focal" (with
    alpha and gamma) or "softmax". Without l1 and giou (0), predictions need no boxes.
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
        """Cost of every slot for every object of its image: [L, T, Q], float32 or float64.

        Not differentiable. Without the compiled operator as `plain`, with the same values.
        """
        logits, boxes = predictions.logits.detach(), predictions.boxes
        if boxes is None or not use_kernel("matching_costs", logits.device):
            return self.plain(logits, boxes, objects)
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

    def plain(self, logits: Tensor, boxes: Tensor | None, objects: Objects) -> Tensor:
        """The costs in plain PyTorch: logits [L, B, Q, K], boxes [L, B, Q, 4] -> [L, T, Q]."""
        image_of, labels = objects.image_of, objects.labels
        if self.kind == "focal":
            class_cost = focal_cost(logits, image_of, labels, self.alpha, self.gamma)
        else:
            class_cost = softmax_cost(logits, image_of, labels)
        if self.l1 == self.giou == 0:
            return self.class_cost * class_cost
        if boxes is None:
            raise ValueError(
                "these predictions have no boxes: the costs of L1 and GIoU must be 0, got "
                f"{self.l1} and {self.giou}"
            )
        return (
            self.class_cost * class_cost
            + self.l1 * l1_cost(boxes, image_of, objects.boxes)
            + self.giou * giou_cost(boxes, image_of, objects.boxes)
        )
