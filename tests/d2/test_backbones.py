"""Backbones beside Detectron2's own."""

from __future__ import annotations

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from dn_detr.conversion.name_table import Table, resnet
from dn_detr.d2 import add_dn_detr_config

RGB = ShapeSpec(channels=3)


def config(**keys):
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.MODEL.DN_DETR.BACKBONE_PRETRAINED = False
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def build(name, cfg):
    return BACKBONE_REGISTRY.get(name)(cfg, RGB)


@pytest.mark.parametrize("dilated", [False, True])
def test_resnet_equals_that_of_torchvision_with_its_weights(dilated):
    """Which is the backbone of the published detectors: also dilated, in the first block too."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(
        weights=None, replace_stride_with_dilation=[False, False, dilated]
    )
    theirs.eval().double()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    cfg = config(
        MODEL__RESNETS__STRIDE_IN_1X1=False,
        MODEL__RESNETS__OUT_FEATURES=["res3", "res5"],
        MODEL__RESNETS__RES5_DILATION=2 if dilated else 1,
    )
    ours = build("build_dc5_resnet_backbone" if dilated else "build_resnet_backbone", cfg)
    state = {f"b.{n}": t for n, t in theirs.state_dict().items() if not n.startswith("fc.")}
    carried, unknown, unused = Table("torchvision", resnet("b")).apply(state)
    assert not unknown and not unused
    ours.double().load_state_dict({n.removeprefix("backbone."): t for n, t in carried.items()})
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
    expected = theirs.layer2(theirs.layer1(x))
    found = ours.eval()(images)
    torch.testing.assert_close(found["res3"], expected)
    expected = theirs.layer4(theirs.layer3(expected))
    torch.testing.assert_close(found["res5"], expected)
    assert ours.output_shape()["res5"].stride == (16 if dilated else 32)


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "convnext_tiny", "efficientnet_b0"])
def test_a_torchvision_backbone_gives_the_features_that_it_promises(name):
    backbone = build("build_named_backbone", config(MODEL__DN_DETR__BACKBONE=f"torchvision/{name}"))
    features = backbone(torch.randn(1, 3, 64, 96))
    assert list(features) == ["res2", "res3", "res4", "res5"]
    for feature, shape in zip(features.values(), backbone.output_shape().values(), strict=True):
        cells = 64 // shape.stride, 96 // shape.stride
        assert feature.shape == (1, shape.channels, *cells)


def test_freezing_reaches_up_to_the_named_feature():
    cfg = config(MODEL__DN_DETR__BACKBONE="torchvision/resnet18", MODEL__BACKBONE__FREEZE_AT=2)
    backbone = build("build_named_backbone", cfg)
    parts = backbone.stages.parts  # stem of four modules, then four stages
    assert [all(not p.requires_grad for p in part.parameters()) for part in parts[4:]] == [
        True,
        False,
        False,
        False,
    ]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())


@pytest.mark.parametrize(
    ("name", "freeze_at", "sentence"),
    [
        ("timm/resnet10t", 2, "FREEZE_AT must be 0 for backbones of timm, got 2$"),
        ("torchvision/resnet18", 1, r"must be 0 or the number of a .*\['res2', .*\], got 1$"),
    ],
)
def test_what_cannot_be_frozen_is_refused(name, freeze_at, sentence):
    """One sentence spoke of a feature's number for timm, and then forbade it."""
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    cfg = config(MODEL__DN_DETR__BACKBONE=name, MODEL__BACKBONE__FREEZE_AT=freeze_at)
    with pytest.raises(ValueError, match=sentence):
        build("build_named_backbone", cfg)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_a_timm_backbone_gives_the_features_that_it_promises(name):
    pytest.importorskip("timm")
    backbone = build("build_named_backbone", config(MODEL__DN_DETR__BACKBONE=f"timm/{name}"))
    features = backbone(torch.randn(1, 3, 64, 96))
    assert features["res5"].shape == (1, backbone.output_shape()["res5"].channels, 2, 3)


@pytest.mark.parametrize(
    "name",
    [
        "timm/tf_efficientnet_lite0",
        "timm/regnetx_002",
        "timm/resnet10t",
        "torchvision/mobilenet_v2",
    ],
)
def test_frozen_norms_compute_what_the_network_computes(name):
    """Activations are a part of many of timm's batch norms, and were lost with them."""
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    frozen = build("build_named_backbone", config(MODEL__DN_DETR__BACKBONE=name))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    whole = config(MODEL__DN_DETR__BACKBONE=name, MODEL__RESNETS__NORM="BN")
    whole = build("build_named_backbone", whole).eval().double()
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    frozen.double().load_state_dict(whole.state_dict(), strict=False)
    with torch.no_grad():
        found, expected = frozen(images), whole(images)
    for stage, feature in expected.items():
        torch.testing.assert_close(found[stage], feature)


@pytest.mark.parametrize("name", ["", "swin_t", "torchvision/nothing", "other/swin_t"])
def test_an_unknown_backbone_is_refused_by_name(name):
    with pytest.raises(ValueError, match="got|no model"):
        build("build_named_backbone", config(MODEL__DN_DETR__BACKBONE=name))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("timm/resnet50x", r"timm cannot build 'resnet50x': Unknown model \(resnet50x\)$"),
        (
            "timm/vit_tiny_patch16_224",
            "vit_tiny_patch16_224 is no backbone for images of any size: .*Input height .*[^.]$",
        ),
        ("torchvision/inception_v3", "inception_v3 is no backbone for images of any size: "),
    ],
)
def test_a_network_that_is_no_backbone_is_refused_in_one_sentence(name, sentence):
    """They ended in a RuntimeError or an AssertionError of the library."""
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=sentence):
        build("build_named_backbone", config(MODEL__DN_DETR__BACKBONE=name))
