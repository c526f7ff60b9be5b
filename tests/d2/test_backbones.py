"""Backbones beside Detectron2's own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from dn_detr.conversion.name_table import Table, resnet
from dn_detr.d2 import add_dn_detr_config
from dn_detr.d2.config.defaults import read_config
from dn_detr.errors import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
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
            "timm/volo_d1_224",
            "volo_d1_224 is no backbone for images of any size: .*size of tensor .*[^.]$",
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


@pytest.mark.parametrize(
    "name", ["regnet_x_400mf", "shufflenet_v2_x0_5", "mnasnet0_5", "googlenet", "densenet121"]
)
def test_the_stages_of_torchvision_compute_what_its_classifier_computes(name):
    """Some were refused, and RegNet had its last feature alone: its stages are in one sequence."""
    backbone = build("build_named_backbone", config(MODEL__DN_DETR__BACKBONE=f"torchvision/{name}"))
    assert list(backbone.output_shape()) == ["res2", "res3", "res4", "res5"]
    classifier = torchvision.models.get_model(name, weights=None).eval()
    names = backbone.library_names()
    ours = {names[key]: value for key, value in classifier.state_dict().items() if names[key]}
    assert not backbone.load_state_dict(ours, strict=False).missing_keys
    seen = []
    pooled = {"densenet121": "features", "shufflenet_v2_x0_5": "conv5", "mnasnet0_5": "layers"}
    last = pooled.get(name, "inception5b" if name == "googlenet" else "trunk_output")
    getattr(classifier, last).register_forward_hook(lambda _m, _a, out: seen.append(out.clone()))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        classifier(images)
        found = backbone.eval()(images)["res5"]
    torch.testing.assert_close(found, seen[0])


def test_googlenet_expects_the_pixels_that_its_weights_were_trained_with():
    """Its classifier normalizes once more, to 0.5 and 0.5, which the backbone does not."""
    backbone = build(
        "build_named_backbone", config(MODEL__DN_DETR__BACKBONE="torchvision/googlenet")
    )
    images = torch.rand(1, 3, 8, 8)
    order, mean, std = backbone.normalisation
    ours = (255 * images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    classifier = torchvision.models.googlenet(
        weights=None, transform_input=True, init_weights=False
    )
    transforms = torchvision.models.GoogLeNet_Weights.DEFAULT.transforms()
    theirs = torchvision.transforms.functional.normalize(images, transforms.mean, transforms.std)
    torch.testing.assert_close(ours, classifier._transform_input(theirs))
    assert order == "RGB"


PLAIN = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]


def plain(name, **keys):
    """A plain vision transformer with few blocks of random parameters, as a backbone."""
    backbone = build(
        "build_named_backbone", config(MODEL__DN_DETR__BACKBONE=f"timm/{name}", **keys)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.05)
    return backbone.eval()


@pytest.mark.parametrize("size", [(224, 224), (64, 96), (96, 352)])
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_vision_transformer_has_the_features_of_timm(name, size):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, num_classes=0, dynamic_img_size=True, patch_size=16)
    backbone = plain(name).double()
    names = backbone.library_names()
    ours = backbone.state_dict()
    theirs.load_state_dict({key: ours[names[key]] for key in theirs.state_dict()})
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        tokens = theirs.double().eval().forward_features(images)
        found = backbone(images)
    tokens = tokens[:, theirs.num_prefix_tokens :].transpose(1, 2)
    expected = tokens.unflatten(2, (size[0] // 16, size[1] // 16))
    torch.testing.assert_close(found["res4"], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["res5"], nn.functional.max_pool2d(expected, 2))
    for feature, (key, shape) in zip(found.values(), backbone.output_shape().items(), strict=True):
        cells = size[0] // shape.stride, size[1] // shape.stride
        assert feature.shape == (2, shape.channels, *cells), key


def test_a_plain_vision_transformer_makes_the_features_that_the_detector_reads():
    """No others, whose parameters would get no gradient."""
    pytest.importorskip("timm")
    features = ["res2", "res5"]
    backbone = plain(PLAIN[0], MODEL__DN_DETR__IN_FEATURES=features)
    assert list(backbone(torch.randn(1, 3, 64, 96))) == list(backbone.output_shape()) == features
    sum(f.square().sum() for f in backbone(torch.randn(1, 3, 64, 96)).values()).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []
    with pytest.raises(ValueError, match="IN_FEATURES has 'p3', but the features .*'res2'"):
        plain(PLAIN[0], MODEL__DN_DETR__IN_FEATURES=["p3"])


def test_windows_are_those_of_attention_within_windows():
    """Compared with blocks that get each window as an image of its own; the third is global."""
    pytest.importorskip("timm")
    backbone = plain("vit_tiny_patch16_224", MODEL__DN_DETR__BACKBONE_WINDOW=3).double()
    model = backbone.stages.model
    seen = []
    model.blocks[2].register_forward_hook(lambda _m, _a, out: seen.append(out))
    images = torch.randn(2, 3, 96, 64, dtype=torch.float64)  # 6 x 4 patches in 2 x 2 windows
    with torch.no_grad():
        backbone(images)
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        prefix, tokens = x[:, :1], x[:, 1:].reshape(2, 6, 4, -1)
        for block in model.blocks[:2]:
            padded = nn.functional.pad(tokens, (0, 0, 0, 2))
            prefixes, new = [], torch.empty_like(padded)
            for top, left in ((0, 0), (0, 3), (3, 0), (3, 3)):
                place = (slice(None), slice(top, top + 3), slice(left, left + 3))
                window = torch.cat([prefix, padded[place].reshape(2, 9, -1)], 1)
                out = type(block).forward(block, window)  # without the hooks
                prefixes.append(out[:, :1])
                new[place] = out[:, 1:].reshape(2, 3, 3, -1)
            prefix, tokens = torch.stack(prefixes).mean(0), new[:, :, :4]
        expected = model.blocks[2](torch.cat([prefix, tokens.flatten(1, 2)], 1))
    torch.testing.assert_close(seen[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("timm/vit_small_patch16_dinov3", 7),
        ("timm/resnet10t", 7),
        ("timm/vit_tiny_patch16_224", -7),
        ("torchvision/resnet18", 7),
    ],
)
def test_windows_need_absolute_positions(name, window):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    cfg = config(MODEL__DN_DETR__BACKBONE=name, MODEL__DN_DETR__BACKBONE_WINDOW=window)
    with pytest.raises(ValueError, match=f"WINDOW must be 0, or .* is {name.partition('/')[2]}$"):
        build("build_named_backbone", cfg)


@pytest.mark.filterwarnings("ignore")
def test_a_plain_vision_transformer_says_that_it_cannot_be_exported():
    """The exported file failed in onnxruntime, on the example itself."""
    pytest.importorskip("timm")
    with pytest.raises(InputError, match="vit_tiny_patch16_224 resamples its positions"):
        torch.export.export(plain(PLAIN[0]), (torch.zeros(1, 3, 64, 96),), strict=False)


def test_a_copy_of_a_windowed_transformer_uses_its_own_windows():
    """As the moving average of the weights does, whose images may have another size."""
    pytest.importorskip("timm")
    backbone = plain(PLAIN[0], MODEL__DN_DETR__BACKBONE_WINDOW=3)
    copied = copy.deepcopy(backbone)
    expected = backbone(torch.ones(1, 3, 64, 96))["res4"]
    backbone(torch.ones(1, 3, 128, 32))
    assert torch.equal(copied(torch.ones(1, 3, 64, 96))["res4"], expected)


def test_the_configuration_with_a_vision_transformer_trains_all_that_it_has():
    """Every parameter gets a gradient, or several processes would wait for it."""
    pytest.importorskip("timm")
    cfg = read_config(str(CONFIGS / "backbones" / "dn_deformable_vit.yaml"), [])
    node, cfg.MODEL.DEVICE = cfg.MODEL.DN_DETR, "cpu"
    node.BACKBONE, node.BACKBONE_PRETRAINED = "timm/vit_tiny_patch16_224", False
    node.NUM_CLASSES = 2
    model = build_model(cfg)
    instances = Instances((75, 101))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 20.0, 60.0, 70.0]]))
    instances.gt_classes = torch.tensor([1])
    image = torch.randint(0, 256, (3, 75, 101), dtype=torch.uint8)
    sample = {"image": image, "height": 75, "width": 101, "image_id": 1, "instances": instances}
    sum(model([sample]).values()).backward()
    assert [n for n, p in model.backbone.named_parameters() if p.grad is None] == []
    found = model.eval()([{"image": image, "height": 75, "width": 101}])[0]["instances"]
    assert len(found) and found.image_size == (75, 101)
