"""The commands of docs/recipes.md exist in the authors' code and have the numbers of ours."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from dn_detr.d2.config.defaults import read_config

ROOT = Path(__file__).resolve().parents[2]
BRANCH = "ConditionalDETR, branch GroupDETR,"


def sources() -> dict[str, tuple[str, str]]:
    """Configuration -> (repository, command or file), "the same" of the table resolved."""
    found, last = {}, ("", "")
    for line in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("| `"):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        source = cells[-2].replace(BRANCH, "GroupDETR")
        _, *quoted = re.split(r"`([^`]+)`", source)
        if source.startswith("the same"):
            found[cells[0].strip("`")] = (last[0], f"{last[1]} {quoted[0] if quoted else ''}")
        elif quoted:
            last = (source.split(" ")[0], quoted[0])
            found[cells[0].strip("`")] = last
    return found


def their_options(folder: Path, command: str) -> list[str] | None:
    """Options of their main.py; None for a configuration of Detectron2 or DINO."""
    if command.startswith("main.py"):
        return command.split()[1:]
    file = folder / command
    assert file.is_file(), f"there is no {file}"
    if file.suffix != ".sh" or "config/DINO" in file.read_text():
        return None
    lines = file.read_text().replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if "main.py" in line]
    return re.sub(r"(--output_dir )?\$\{\w+\}", "", line.split("main.py")[1]).split()


@pytest.mark.parametrize("name", sources())
def test_the_command_of_a_recipe_has_the_numbers_of_the_configuration(name, authors, monkeypatch):
    repository, command = sources()[name]
    if repository == "Detectron2":
        pytest.skip("a configuration of Detectron2's package")
    load = authors(repository)
    options = their_options(load.path, command)
    if options is None:
        return
    monkeypatch.setattr(sys, "argv", ["main.py"])
    parser = ArgumentParser(parents=[load("main").get_args_parser()])
    args = vars(parser.parse_args([*options, "--coco_path", ".", "--output_dir", "."]))
    cfg = read_config(str(ROOT / "configs" / f"{name}.yaml"), [])
    node, solver = cfg.MODEL.DN_DETR, cfg.SOLVER
    steps = -(-118287 // solver.IMS_PER_BATCH)
    queries = ("num_queries", "num_query_position", "num_queries_one2one")
    patterns = ("num_patterns", "num_query_pattern")
    expected = {
        "lr": solver.BASE_LR,
        "lr_backbone": solver.BASE_LR * solver.BACKBONE_MULTIPLIER,
        "weight_decay": solver.WEIGHT_DECAY,
        "clip_max_norm": solver.CLIP_GRADIENTS.CLIP_VALUE,
        "epochs": solver.MAX_ITER / steps,
        "lr_drop": solver.STEPS[0] / steps,
        "dilation": cfg.MODEL.BACKBONE.NAME == "build_dc5_resnet_backbone",
        "backbone": f"resnet{cfg.MODEL.RESNETS.DEPTH}",
        **dict.fromkeys(queries, node.NUM_QUERIES),
        **dict.fromkeys(patterns, node.NUM_PATTERNS),
        "num_queries_one2many": node.HYBRID.NUM_QUERIES,
        "k_one2many": node.HYBRID.MATCHES_PER_OBJECT,
        "lambda_one2many": node.HYBRID.WEIGHT,
        "group_detr": node.NUM_GROUPS,
        "use_dn": node.DENOISING.ENABLED,
        "num_feature_levels": node.NUM_LEVELS,
        "enc_layers": node.ENCODER_LAYERS,
        "dec_layers": node.DECODER_LAYERS,
        "hidden_dim": node.CHANNELS,
        "nheads": node.NUM_HEADS,
        "dim_feedforward": node.FEED_FORWARD_DIM,
        "dropout": node.DROPOUT,
        "set_cost_class": node.LOSS.COST_CLASS,
        "set_cost_bbox": node.LOSS.COST_L1,
        "set_cost_giou": node.LOSS.COST_GIOU,
        "cls_loss_coef": node.LOSS.CLASS_WEIGHT,
        "bbox_loss_coef": node.LOSS.L1_WEIGHT,
        "giou_loss_coef": node.LOSS.GIOU_WEIGHT,
        "focal_alpha": node.LOSS.FOCAL_ALPHA,
        "eos_coef": node.LOSS.NO_OBJECT_WEIGHT,
        "topk": cfg.TEST.DETECTIONS_PER_IMAGE,
    }
    if "deformable" not in args.get("modelname", "") or "encoder_only" in args["modelname"]:
        expected["num_select"] = cfg.TEST.DETECTIONS_PER_IMAGE
    if repository in ("Deformable-DETR", "H-Deformable-DETR"):
        expected["lr_linear_proj_mult"] = solver.SAMPLING_MULTIPLIER
    if repository != "Deformable-DETR":  # published with 32 images
        expected["batch_size"] = solver.IMS_PER_BATCH / 8
    if args.get("use_dn"):
        expected |= {
            "scalar": node.DENOISING.NUM_GROUPS,
            "box_noise_scale": node.DENOISING.BOX_NOISE,
            "label_noise_scale": node.DENOISING.LABEL_NOISE,
        }
    if "anchor" in name:
        expected.pop("num_feature_levels")
    differ = {
        key: (args[key], value)
        for key, value in expected.items()
        if key in args and args[key] != pytest.approx(value)
    }
    assert not differ, "theirs and ours"
