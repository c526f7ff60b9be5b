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
    center, size = at_least_float32(boxes).split(2, dim=-1)
    half = size * 0.5
    return torch.cat((center - half, center + half), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes [..., 4] from (x0, y0, x1, y1) to (cx, cy, w, h)."""
    x0, y0, x1, y1 = at_least_float32(boxes).unbind(-1)
    return torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=-1)


def overlaps(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the areas [...] of intersection, union and hull of boxes [..., 4], broadcast."""
    a, b = torch.broadcast_tensors(at_least_float32(a_xyxy), at_least_float32(b_xyxy))
    (a_low, a_high), (b_low, b_high) = a.split(2, dim=-1), b.split(2, dim=-1)
    inner, outer = torch.maximum(a_low, b_low), torch.minimum(a_low, b_low)
    low = torch.stack((a_low, b_low, inner, outer))
    inner, outer = torch.minimum(a_high, b_high), torch.maximum(a_high, b_high)
    width, height = (torch.stack((a_high, b_high, inner, outer)) - low).clamp(min=0).unbind(-1)
    area_a, area_b, intersection, hull = (width * height).unbind()
    return intersection, area_a + area_b - intersection, hull


def elementwise_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Compute the IoU [...], in [0, 1], of xyxy boxes [..., 4] broadcast against each other.

    0 if neither box has an area. Gradients are finite.
    """
    intersection, union, _ = overlaps(a_xyxy, b_xyxy)
    return intersection / union.clamp(min=SMALLEST_AREA)


def elementwise_generalized_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Compute the generalized IoU [...], in [-1, 1], of xyxy boxes [..., 4] (1902.09630).

    The boxes are broadcast against each other. Values and gradients stay finite for boxes without
    area.
    """
    intersection, union, hull = overlaps(a_xyxy, b_xyxy)
    iou = intersection / union.clamp(min=SMALLEST_AREA)
    return iou - (hull - union) / hull.clamp(min=SMALLEST_AREA)
