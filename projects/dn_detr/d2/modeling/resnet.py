"""ResNet backbones that Detectron2 does not have."""

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
    """Build a ResNet-10 (1512.03385, one basic block per stage) of any width, to train on a CPU.

    It reads MODEL.RESNETS: STEM_OUT_CHANNELS, RES2_OUT_CHANNELS (doubled at each stage), NORM,
    OUT_FEATURES, RES5_DILATION (with 2 the last stage keeps the resolution, without dilation); and
    MODEL.BACKBONE.FREEZE_AT.
    """
    node = cfg.MODEL.RESNETS
    width = node.STEM_OUT_CHANNELS
    stem = BasicStem(in_channels=input_shape.channels, out_channels=width, norm=node.NORM)
    stages, in_channels = [], width
    for index in range(4):
        keeps_size = index == 0 or (index == 3 and node.RES5_DILATION == 2)
        out_channels = node.RES2_OUT_CHANNELS * 2**index
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks=1,
                stride_per_block=[1 if keeps_size else 2],
                in_channels=in_channels,
                out_channels=out_channels,
                norm=node.NORM,
            )
        )
        in_channels = out_channels
    model = ResNet(stem, stages, out_features=node.OUT_FEATURES)
    return model.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_thin_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build a thin ResNet with the feature pyramid of MODEL.FPN; see build_thin_resnet_backbone."""
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
    """Build Detectron2's ResNet with the dilated last stage of torchvision and DETR.

    The first block of the stage has a dilation of 1. Needs MODEL.RESNETS.RES5_DILATION 2.
    """
    if cfg.MODEL.RESNETS.RES5_DILATION != 2:
        raise ValueError(
            "build_dc5_resnet_backbone needs MODEL.RESNETS.RES5_DILATION 2, "
            f"got {cfg.MODEL.RESNETS.RES5_DILATION}"
        )
    model = build_resnet_backbone(cfg, input_shape)
    first = model.res5[0].conv2
    first.dilation = first.padding = (1, 1)
    return model
