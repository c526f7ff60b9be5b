"""From a file as the authors write it to a detector that evaluates."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torchvision
from peers import randomize
from published import PUBLISHED, Authors, our_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_documented_command_converts_every_method(name, authors, monkeypatch, tmp_path):
    """Nothing but the file, the method and the configuration is known."""
    from dn_detr.d2.inference.saved_detector import load_detector

    published = PUBLISHED[name]
    load = authors(published.repository)
    monkeypatch.chdir(load.path)
    source, converted = tmp_path / "checkpoint.pth", tmp_path / "converted.pth"
    torch.save({"model": Authors(published, load, monkeypatch).model().state_dict()}, source)
    method = our_config(name, published.num_classes).MODEL.DN_DETR.METHOD
    config = ROOT / "configs" / f"{name}.yaml"
    options = ["--method", method, "--classes", "coco80", "--config-file", config]
    tool = [sys.executable, ROOT / "tools" / "convert_checkpoint.py", source, converted]
    subprocess.run([*tool, *options], check=True, cwd=ROOT)
    saved = load_detector(str(converted), device="cpu")
    assert saved.model.num_classes == 80 and saved.class_names[11] == "stop sign"
    source.unlink()
    converted.unlink()


def test_a_checkpoint_of_the_authors_becomes_one_of_the_configured_detector(authors, tmp_path):
    """DN-DETR with 91 raw classes: converted to 80 by the tool, and loaded whole."""
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    from dn_detr.d2 import add_dn_detr_config
    from dn_detr.d2.engine.checkpoint import Checkpointer
    from dn_detr.d2.inference.saved_detector import load_detector

    load = authors("DN-DETR")
    args = Namespace(
        hidden_dim=256,
        dropout=0.0,
        nheads=8,
        num_queries=300,
        dim_feedforward=2048,
        enc_layers=6,
        dec_layers=6,
        pre_norm=False,
        transformer_activation="prelu",
        num_patterns=0,
    )
    backbone = torch.nn.Sequential(torch.nn.Module())
    backbone[0].body = torchvision.models.resnet50(weights=None)
    del backbone[0].body.fc
    backbone.num_channels = 2048
    theirs = load("models.DN_DAB_DETR.DABDETR").DABDETR(
        backbone,
        load("models.DN_DAB_DETR.transformer").build_transformer(args),
        num_classes=91,
        num_queries=300,
    )
    randomize(theirs)
    source, converted = tmp_path / "checkpoint.pth", tmp_path / "converted.pth"
    torch.save({"model": theirs.state_dict(), "args": args, "epoch": 49}, source)
    tool = [sys.executable, "-m", "dn_detr", "convert", "weights", "--method", "dab_detr"]
    config = ROOT / "configs" / "dn_detr.yaml"
    options = ["--classes", "coco80", "--config", config]
    subprocess.run([*tool, source, "--output", converted, *options], check=True)
    saved = load_detector(str(converted), device="cpu")
    assert saved.cfg.MODEL.DN_DETR.AS_PUBLISHED and saved.class_names[11] == "stop sign"

    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "dn_detr.yaml"))
    cfg.MODEL.DN_DETR.NUM_CLASSES = 80
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    loaded = Checkpointer(model).load(str(converted))
    assert loaded is not None
    state = model.state_dict()
    for name, tensor in torch.load(converted, weights_only=True)["model"].items():
        assert torch.equal(state.pop(name), tensor), name
    assert not state
    person = model.core.decoder.predictor.heads.class_heads[0].weight[0]
    assert torch.equal(person, theirs.class_embed.weight[1])
