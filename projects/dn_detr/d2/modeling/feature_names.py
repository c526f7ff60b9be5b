"""Refuses configurations that name features which the backbone does not have."""

from __future__ import annotations

from collections.abc import Iterable

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone


def check_features(key: str, names: Iterable[str], available: Iterable[str]) -> None:
    """Raise ValueError where `names`, the value of the configuration's `key`, are not
    `available`.
    """
    available = list(available)
    for name in names:
        if name not in available:
            raise ValueError(
                f"{key} has {name!r}, but the features of the backbone are {available}"
            )


def check_rcnn_features(cfg: CfgNode) -> None:
    """Do so for the keys of Faster R-CNN. Builds the backbone: for after a KeyError."""
    model = cfg.MODEL
    if "fpn" in model.BACKBONE.NAME:
        check_features("MODEL.FPN.IN_FEATURES", model.FPN.IN_FEATURES, model.RESNETS.OUT_FEATURES)
    shapes = build_backbone(cfg).output_shape()
    for head in ("RPN", "ROI_HEADS"):
        check_features(f"MODEL.{head}.IN_FEATURES", model[head].IN_FEATURES, shapes)
