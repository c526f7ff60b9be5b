"""Box arithmetic on cxcywh or xyxy boxes in any unit.

Everything is computed in float32 (float64 stays float64), even under autocast: half precision
cannot resolve single pixels of a large image.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_AREA = 1e-9
"""Lower bound of divisors: the area of 0.04 x 0.04 pixels in an image of 1333 x 1333."""


def at_least_float32(x: Tensor) -> Tensor:
    """Cast `x` [...] to float32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_sigmoid(x: Tensor, epsilon: float) -> Tensor:
    """Compute the logit of `x` [...] in [0, 1], elementwise: log(max(x, e) / max(1 - x, e)),
    as in the code of Deformable DETR.

    With two-sided clamps, because ONNX exporters break one-sided ones.
    """
    x = at_least_float32(x)
    return torch.log(x.clamp(epsilon, 1.0) / (1 - x).clamp(epsilon, 1.0))


def keep_inside(x: Tensor, epsilon: float) -> Tensor:
    """Compute sigmoid(inverse_sigmoid(x, e)), elementwise: `x` [...] between e and 1 - e, and at
    least e / (1 + e) and at most 1 / (1 + e).
    """
    low, high = x.clamp(epsilon, 1.0), (1 - x).clamp(epsilon, 1.0)
    return low / (low + high)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes [..., 4] from (cx, cy, w, h) to (x0, y0, x1, y1)."""
    cx, cy, w, h = at_least_float32(boxes).unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes [..., 4] from (x0, y0, x1, y1) to (cx, cy, w, h)."""
    x0, y0, x1, y1 = at_least_float32(boxes).unbind(-1)
    return torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=-1)


def area(boxes_xyxy: Tensor) -> Tensor:
    """Compute areas [...] of xyxy boxes [..., 4]; 0 for boxes of negative width or height."""
    x0, y0, x1, y1 = at_least_float32(boxes_xyxy).unbind(-1)
    return (x1 - x0).clamp(min=0) * (y1 - y0).clamp(min=0)


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = area(torch.cat((low, high), dim=-1))
    return intersection, area(a) + area(b) - intersection


def elementwise_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Compute the IoU [...], in [0, 1], of xyxy boxes [..., 4] broadcast against each other.

    0 if neither box has an area. Gradients are finite.
    """
    a, b = at_least_float32(a_xyxy), at_least_float32(b_xyxy)
    intersection, union = _intersection_and_union(a, b)
    return intersection / union.clamp(min=SMALLEST_AREA)


def elementwise_generalized_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Compute the generalized IoU [...], in [-1, 1], of xyxy boxes [..., 4] (1902.09630).

    The boxes are broadcast against each other. Values and gradients stay finite for boxes without
    area.
    """
    a, b = at_least_float32(a_xyxy), at_least_float32(b_xyxy)
    intersection, union = _intersection_and_union(a, b)
    low = torch.minimum(a[..., :2], b[..., :2])
    high = torch.maximum(a[..., 2:], b[..., 2:])
    hull = area(torch.cat((low, high), dim=-1))
    iou = intersection / union.clamp(min=SMALLEST_AREA)
    return iou - (hull - union) / hull.clamp(min=SMALLEST_AREA)
