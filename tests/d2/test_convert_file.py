"""Published weights by name: from a local server to a detector that evaluates."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from weights_server import serving

from dn_detr.cli import weights as command
from dn_detr.conversion import published_weights
from dn_detr.conversion.convert_weights import COCO_CATEGORIES
from dn_detr.conversion.name_table import Table
from dn_detr.conversion.published_weights import PublishedWeights, catalogue
from dn_detr.conversion.tables import TABLES
from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.engine.checkpoint import Checkpointer
from dn_detr.d2.inference.saved_detector import load_detector
from dn_detr.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


OPTIONS = (  # a ResNet-50 with few channels
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", "50"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.RES5_DILATION", "1"),
)


def configured(num_classes):
    opts = [*OPTIONS, "MODEL.DN_DETR.NUM_CLASSES", str(num_classes), "MODEL.DEVICE", "cpu"]
    return read_config("configs/quick/detr.yaml", opts)


def their_state(state: dict[str, torch.Tensor], table: Table) -> dict[str, torch.Tensor]:
    """Name parameters of ours as a table's project does: its rules, from right to left."""
    theirs = {}
    for name, rule in table.rules.items():
        parts = (rule,) if isinstance(rule, str) else rule
        for ours, value in state.items():
            pattern = re.escape(parts[0]).replace(r"\{\}", r"(\d+)")
            match = re.fullmatch(rf"(?:core\.)?{pattern}((?:\.(?:weight|bias|running_\w+))?)", ours)
            if match is None:
                continue
            *numbers, leaf = match.groups()
            prefix = "" if ours.startswith("backbone.") else "core."
            rows = [state[f"{prefix}{part.format(*numbers)}{leaf}"] for part in parts]
            key = name.format(*numbers) + (leaf if isinstance(rule, str) else "")
            theirs[key] = torch.cat(rows) if len(rows) > 1 else value
    return theirs


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small DETR of 91 raw ids, published as "small-detr"; gives its parameters, our names."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DN_DETR_CACHE", str(tmp_path / "cache"))
    model = build_model(configured(91))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.1, 0.1)
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": their_state(model.state_dict(), TABLES["detr"][0])}, file)
    with serving() as server:
        server.files["/checkpoint.pth"] = file.read_bytes()
        entry = PublishedWeights(
            name="small-detr",
            method="detr",
            ap="1.0",
            address=server.address("/checkpoint.pth"),
            repository="https://example.org/detr",
            commit=40 * "0",
            file="README.md",
            licence="Apache-2.0",
            config="quick/detr",
            options=OPTIONS,
        )
        monkeypatch.setitem(catalogue(), "small-detr", entry)
        yield model.state_dict(), server


def arguments(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_a_name_becomes_a_detector_of_cocos_80_classes(published, tmp_path, capsys):
    state, server = published
    detector = load_detector("small-detr", device="cpu")
    assert detector.class_names[11] == "stop sign" and len(detector.class_names) == 80
    ours = detector.model.state_dict()
    head = "core.decoder.predictor.heads.class_heads.0.weight"
    assert torch.equal(ours[head], state[head][[*COCO_CATEGORIES, 91]])
    for name in set(ours) - {head, head.replace("weight", "bias")}:
        assert torch.equal(ours[name], state[name]), name
    command.run(arguments("small-detr", "--output", str(tmp_path / "new" / "detr.pth")))
    assert len(server.ranges) == 1  # the second time, nothing is fetched
    said = capsys.readouterr().out
    assert "Licence: Apache-2.0" in said and "not tried here" in said
    assert (
        load_detector(str(tmp_path / "new" / "detr.pth"), device="cpu").class_names[0] == "person"
    )


def test_a_training_starts_from_a_name(published):
    state, _ = published
    model = build_model(configured(3))
    Checkpointer(model, is_for_training=True).load("small-detr", checkpointables=[])
    name = "core.encoder.layers.0.attention.q.weight"
    assert torch.equal(model.state_dict()[name], state[name])


@pytest.mark.usefixtures("published")
def test_weights_that_do_not_fit_their_configuration_leave_nothing(tmp_path, monkeypatch):
    entry = catalogue()["small-detr"]
    options = {**vars(entry), "options": (*OPTIONS, "MODEL.DN_DETR.CHANNELS", "48")}
    monkeypatch.setitem(catalogue(), "small-detr", PublishedWeights(**options))
    with pytest.raises(InputError, match="quick/detr does not fit"):
        load_detector("small-detr", device="cpu")
    assert not list((tmp_path / "cache" / "converted").iterdir())


@pytest.mark.usefixtures("published")
def test_a_file_of_this_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small-detr").write_bytes(b"of the user")
    with pytest.raises(InputError, match="'small-detr' cannot be loaded as a checkpoint"):
        load_detector("small-detr", device="cpu")


def test_a_checkpoint_cannot_name_weights_to_fetch(published, tmp_path):
    """Only what the user names is fetched: the configuration in a file says nothing of it."""
    _, server = published
    cfg = configured(1)
    state, cfg.MODEL.WEIGHTS = build_model(cfg).state_dict(), "small-detr"
    path = tmp_path / "model.pth"
    about = {"format": 2, "config": cfg.dump(), "class_names": ["cell"]}
    torch.save({"model": state, "detector": about}, path)
    load_detector(str(path), device="cpu")
    assert server.ranges == []


def test_what_has_no_configuration_is_listed_only(capsys):
    with pytest.raises(InputError, match="cannot be converted.*It is published at https://"):
        command.run(arguments("detrex-dino-r50-4scale-24ep"))
    capsys.readouterr()
    command.run(arguments())
    said = capsys.readouterr().out
    assert "detrex-dino-r50-4scale-24ep: dino, cannot be converted; AP 50.6; pth" in said
    assert all(f"  {weights.name}: " in said for weights in catalogue().values())


@pytest.mark.parametrize("config", sorted({w.config for w in catalogue().values() if w.config}))
def test_the_configurations_of_the_catalogue_are_of_its_methods(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    for weights in catalogue().values():
        if weights.config == config:
            cfg = read_config(f"configs/{config}.yaml", list(weights.options))
            assert weights.method == cfg.MODEL.DN_DETR.METHOD, weights.name


def test_the_catalogue_travels_with_the_package():
    assert Path(published_weights.__file__).with_suffix(".toml").is_file()
    assert "conversion/published_weights.toml" in (ROOT / "pyproject.toml").read_text()
