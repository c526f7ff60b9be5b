"""Box arithmetic. Boxes are cxcywh or xyxy, as the names say, in any one unit.

Everything is computed in float32 (float64 stays float64), whatever autocast says: half precision
cannot tell apart neighbouring pixels of a large image.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_AREA = 1e-9
"""Divisors below this are raised to it: a box of 0.04 x 0.04 pixels in an image of 1333 x 1333."""


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged where it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_sigmoid(x: Tensor, epsilon: float) -> Tensor:
    """Logit of `x` after clamping it to [epsilon, 1 - epsilon].

    One two-sided clamp, because exporters to ONNX break two chained one-sided ones; the result
    differs from the published max(x, epsilon) / max(1 - x, epsilon) by at most epsilon.
    """
    x = at_least_float32(x).clamp(epsilon, 1 - epsilon)
    return torch.log(x / (1 - x))


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size [..., 4] to the top left and bottom right corners [..., 4]."""
    cx, cy, w, h = at_least_float32(boxes).unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Top left and bottom right corners [..., 4] to centre and size [..., 4]."""
    x0, y0, x1, y1 = at_least_float32(boxes).unbind(-1)
    return torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=-1)


def area(boxes_xyxy: Tensor) -> Tensor:
    """Areas [...] of boxes [..., 4]; 0 where the corners are crossed."""
    x0, y0, x1, y1 = at_least_float32(boxes_xyxy).unbind(-1)
    return (x1 - x0).clamp(min=0) * (y1 - y0).clamp(min=0)


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = area(torch.cat((low, high), dim=-1))
    return intersection, area(a) + area(b) - intersection


def elementwise_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Intersection over union, in [0, 1], of boxes [..., 4] that are broadcast to each other.

    0 where both boxes have no area. Gradients are finite.
    """
    a, b = at_least_float32(a_xyxy), at_least_float32(b_xyxy)
    intersection, union = _intersection_and_union(a, b)
    return intersection / union.clamp(min=SMALLEST_AREA)


def elementwise_generalized_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalized IoU (1902.09630), in [-1, 1], of boxes [..., 4] broadcast to each other.

    Boxes without area count as empty sets: the value stays finite and so do its gradients.
    """
    a, b = at_least_float32(a_xyxy), at_least_float32(b_xyxy)
    intersection, union = _intersection_and_union(a, b)
    low = torch.minimum(a[..., :2], b[..., :2])
    high = torch.maximum(a[..., 2:], b[..., 2:])
    hull = area(torch.cat((low, high), dim=-1))
    iou = intersection / union.clamp(min=SMALLEST_AREA)
    return iou - (hull - union) / hull.clamp(min=SMALLEST_AREA)
