"""Backbones beside Detectron2's own."""

from __future__ import annotations

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.backbone.resnet import (
    BasicBlock,
    BasicStem,
    ResNet,
    build_resnet_backbone,
)


@BACKBONE_REGISTRY.register()
def build_thin_resnet_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """ResNet-10 (1512.03385, one basic block a stage) of any width, to train from scratch on a CPU.

    Reads MODEL.RESNETS: STEM_OUT_CHANNELS, RES2_OUT_CHANNELS (doubled at each stage), NORM,
    OUT_FEATURES, RES5_DILATION (2: the last stage keeps the resolution, undilated); and
    MODEL.BACKBONE.FREEZE_AT.
    """
    node = cfg.MODEL.RESNETS
    width = node.STEM_OUT_CHANNELS
    stem = BasicStem(in_channels=input_shape.channels, out_channels=width, norm=node.NORM)
    stages, inside = [], width
    for index in range(4):
        keeps_size = index == 0 or (index == 3 and node.RES5_DILATION == 2)
        outside = node.RES2_OUT_CHANNELS * 2**index
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks=1,
                stride_per_block=[1 if keeps_size else 2],
                in_channels=inside,
                out_channels=outside,
                norm=node.NORM,
            )
        )
        inside = outside
    model = ResNet(stem, stages, out_features=node.OUT_FEATURES)
    return model.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_thin_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """The same with a feature pyramid, as Detectron2's build_resnet_fpn_backbone. Reads MODEL.FPN."""
    return FPN(
        bottom_up=build_thin_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_dc5_resnet_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet with a dilated last stage, as torchvision and DETR dilate it: the first
    block of the stage keeps a dilation of 1. Needs MODEL.RESNETS.RES5_DILATION 2."""
    if cfg.MODEL.RESNETS.RES5_DILATION != 2:
        raise ValueError(
            "build_dc5_resnet_backbone needs MODEL.RESNETS.RES5_DILATION 2, "
            f"got {cfg.MODEL.RESNETS.RES5_DILATION}"
        )
    model = build_resnet_backbone(cfg, input_shape)
    first = model.res5[0].conv2
    first.dilation = first.padding = (1, 1)
    return model
