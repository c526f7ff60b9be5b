"""Learning rate and weight decay of every parameter of every configuration, as published.

`tests/equivalence/test_optimizer_groups.py` compares them with the authors' programs.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.solver.optimizer import build_optimizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("[a-z]*.yaml"))
NORMS = (nn.LayerNorm, nn.GroupNorm)
EMBEDDINGS = r"label_embedding\.weight|level_embedding|learned\.(content|position)"
"""Parameters of an nn.Embedding in the code of Mask2Former and Mask DINO; theirs is also the level
embedding of the decoder, but not that of the encoder."""


def published(name: str, parameter: str, is_norm: bool) -> tuple[float, float] | None:
    """(learning rate, weight decay); None: frozen."""
    is_frozen = re.match(r"backbone\.(bottom_up\.)?(stem|res2)\.", parameter)
    is_backbone = parameter.startswith("backbone.")
    if "faster_rcnn" in name:
        return None if is_frozen else (0.02, 1e-4)
    if "mask" in name:
        is_embedding = re.search(EMBEDDINGS, parameter) and not parameter.startswith("core.flatten")
        return 1e-5 if is_backbone else 1e-4, 0.0 if is_norm or is_embedding else 0.05
    is_deformable_detr = "deformable_detr" in name or name == "h_deformable"
    rate = 2e-4 if is_deformable_detr else 1e-4
    if is_backbone or (
        is_deformable_detr and re.search("sampling_offsets|reference_points", parameter)
    ):
        rate *= 0.1
    return None if is_frozen else (rate, 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_the_published_rate_and_decay(name):
    options = ["MODEL.DEVICE", "meta", "MODEL.DN_DETR.NUM_CLASSES", 80]
    cfg = read_config(str(CONFIGS / f"{name}.yaml"), options)
    with torch.device("meta"):
        model = build_model(cfg)
    found = {
        parameter: (group["lr"], group["weight_decay"])
        for group in build_optimizer(cfg, model).param_groups
        for parameter in group["params"]
    }
    norms = {p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters()}
    for parameter_name, parameter in model.named_parameters():
        expected = published(name, parameter_name, parameter in norms)
        assert found.get(parameter) == (expected and pytest.approx(expected)), parameter_name
