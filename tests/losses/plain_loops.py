"""The same formulas once more, for one slot at a time, in plain Python floats."""

from __future__ import annotations

import math


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def focal_cost(logit: float, alpha: float = 0.25, gamma: float = 2.0) -> float:
    """As published, with its guard against log(0)."""
    p = sigmoid(logit)
    yes = alpha * (1 - p) ** gamma * -math.log(p + 1e-8)
    no = (1 - alpha) * p**gamma * -math.log(1 - p + 1e-8)
    return yes - no


def focal_loss(logit: float, is_target: bool, alpha: float = 0.25, gamma: float = 2.0) -> float:
    p = sigmoid(logit)
    if is_target:
        return -alpha * (1 - p) ** gamma * math.log(p)
    return -(1 - alpha) * p**gamma * math.log(1 - p)


def matchability_aware_loss(logit: float, overlap: float | None, gamma: float = 1.5) -> float:
    """overlap: with the object whose class this is; None: no object says this class."""
    p = sigmoid(logit)
    if overlap is None:
        return -(p**gamma) * math.log(1 - p)
    return -(overlap**gamma) * math.log(p) - (1 - overlap**gamma) * math.log(1 - p)


def l1(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def generalized_iou(a: list[float], b: list[float]) -> float:
    """Of two cxcywh boxes."""
    overlap, share_of_hull = _overlaps(a, b)
    return overlap - (1 - share_of_hull)


def iou(a: list[float], b: list[float]) -> float:
    """Of two cxcywh boxes."""
    return _overlaps(a, b)[0]


def _overlaps(a: list[float], b: list[float]) -> tuple[float, float]:
    """Intersection over union, and union over hull."""
    a = [a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2]
    b = [b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2]
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union, union / hull


def matching_cost(logits: list[float], box: list[float], label: int, target: list[float]) -> float:
    return 2 * focal_cost(logits[label]) + 5 * l1(box, target) - 2 * generalized_iou(box, target)
