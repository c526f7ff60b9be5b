"""What an extension touches: a hyper-parameter, a loss term, a backbone, a method, as patches.

Each patch is applied to a copy of the package, which then trains a step. A file that is not named
here did not have to change.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dn_detr

PACKAGE = Path(dn_detr.__file__).parent
QUICK = Path(__file__).resolve().parents[2] / "configs/quick"

TRAIN = """
import sys
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from dn_detr.d2.config.defaults import read_config

file, *opts = sys.argv[1:]
cfg = read_config(file, ["MODEL.DEVICE", "cpu", "MODEL.DN_DETR.NUM_CLASSES", "3", *opts])
torch.manual_seed(0)
model = build_model(cfg).train()
objects = Instances((64, 96))
objects.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 48.0]]))
objects.gt_classes = torch.tensor([1])
image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
losses = model([{"image": image, "image_id": 1, "instances": objects}], iteration=0)
sum(losses.values()).backward()
print(sorted(losses))
print(type(model.backbone).__name__, sum(map(float, losses.values())))
"""

HYPER_PARAMETER = {
    "methods/detr.py": [
        (
            "def detr(\n    config: BoxConfig,",
            "@dataclass(frozen=True, kw_only=True)\n"
            "class DETRConfig(BoxConfig):\n"
            '    """DETR with a temperature of its own."""\n\n'
            "    # Of the sine position encoding.\n"
            "    temperature: float = 10000.0\n\n\n"
            "def detr(\n    config: DETRConfig,",
        ),
        ("temperature=10000.0", "temperature=c.temperature"),
        ("from torch import nn\n", "from dataclasses import dataclass\n\nfrom torch import nn\n"),
    ]
}

LOSS_TERM = {
    "losses/loss_terms.py": [
        (
            "class GIoU:",
            "class L2:\n"
            '    """Squared distance of boxes."""\n\n'
            "    def __call__(self, matched, num_objects):\n"
            "        loss = (matched.boxes - matched.target_boxes).square().sum(-1)\n"
            "        is_real = matched.is_positive\n"
            "        return _mean_over_objects(loss, is_real, matched, num_objects)\n\n\n"
            "@dataclass(frozen=True, kw_only=True)\n"
            "class GIoU:",
        )
    ],
    "losses/loss_config.py": [
        (
            "    giou_weight: float = 2.0\n",
            "    giou_weight: float = 2.0\n    l2_weight: float = 0.0\n",
        ),
        (
            "        return Criterion(terms",
            '        if self.l2_weight:\n            terms["square"] = (L2(), self.l2_weight)\n'
            "        return Criterion(terms",
        ),
        ("import L1, Focal", "import L1, L2, Focal"),
    ],
}

BACKBONE = {
    "d2/modeling/tiny_backbone.py": '''"""Three strided convolutions."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn


@BACKBONE_REGISTRY.register()
class TinyBackbone(Backbone):
    def __init__(self, cfg, input_shape):
        super().__init__()
        strides = {"res3": 8, "res4": 2, "res5": 2}
        widths = (input_shape.channels, 8, 8, 8)
        self.stages = nn.ModuleDict(
            {
                name: nn.Conv2d(width, 8, stride, stride)
                for (name, stride), width in zip(strides.items(), widths)
            }
        )

    def forward(self, x):
        return {name: (x := stage(x)) for name, stage in self.stages.items()}

    def output_shape(self):
        return {f"res{i}": ShapeSpec(channels=8, stride=2**i) for i in (3, 4, 5)}
''',
    "d2/__init__.py": [
        ("from dn_detr.d2.modeling import ", "from dn_detr.d2.modeling import tiny_backbone, ")
    ],
}

METHOD = {
    "methods/detr_without_encoder.py": '''"""DETR without an encoder."""

from dataclasses import replace

from dn_detr.layers.query_content import QueryContent
from dn_detr.methods.detr import detr
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.model_config import BoxConfig


def detr_without_encoder(
    config: BoxConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    return detr(replace(config, encoder_layers=0), in_channels, strides, content)
''',
    "methods/__init__.py": [
        (
            "from dn_detr.methods.dino import dino\n",
            "from dn_detr.methods.detr_without_encoder import detr_without_encoder\n"
            "from dn_detr.methods.dino import dino\n",
        ),
        (
            '    "detr": detr,\n',
            '    "detr": detr,\n    "detr_without_encoder": detr_without_encoder,\n',
        ),
    ],
}


@pytest.fixture
def train(tmp_path):
    """train(patch, configuration, options) -> the printed lines."""

    def train(patch: dict, config: str, *opts) -> list[str]:
        copy = tmp_path / "dn_detr"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        for name, change in patch.items():
            path = copy / name
            if isinstance(change, str):
                assert not path.exists()
                path.write_text(change)
                continue
            for old, new in change:
                text = path.read_text()
                assert old in text, f"{name}: {old}"
                path.write_text(text.replace(old, new, 1))
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, str(QUICK / config), *map(str, opts)],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return train


def test_a_hyper_parameter_is_one_file(train):
    assert len(HYPER_PARAMETER) == 1
    _, total = train(HYPER_PARAMETER, "detr.yaml", "MODEL.DN_DETR.TEMPERATURE", 20.0)
    assert total


def test_a_loss_term_is_two_files(train):
    assert len(LOSS_TERM) == 2
    names, _ = train(LOSS_TERM, "dn_detr.yaml", "MODEL.DN_DETR.LOSS.L2_WEIGHT", 3.0)
    assert "'loss_square'" in names and "'loss_square_dn_0'" in names


def test_a_backbone_is_its_file_and_an_import(train):
    assert len(BACKBONE) == 2
    opts = ("MODEL.BACKBONE.NAME", "TinyBackbone", "MODEL.WEIGHTS", "")
    _, total = train(BACKBONE, "dn_deformable.yaml", *opts)
    assert total.startswith("TinyBackbone ")


def test_a_method_is_its_file_and_its_name(train):
    assert len(METHOD) == 2
    _, total = train(METHOD, "detr.yaml", "MODEL.DN_DETR.METHOD", "detr_without_encoder")
    assert total
