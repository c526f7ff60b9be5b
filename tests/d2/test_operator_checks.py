"""A Detectron2 without its compiled operators, or an older one: what works, and what is said."""

import importlib.util

import pytest
from detectron2.config import get_cfg
from detectron2.engine import defaults
from detectron2.layers import deform_conv
from detectron2.modeling.backbone import resnet

from dn_detr.d2 import add_dn_detr_config
from dn_detr.d2.engine.trainer import Trainer
from dn_detr.d2.modeling.operator_checks import checked_operators
from dn_detr.errors import InputError


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.DN_DETR.NUM_CLASSES = 2
    return cfg


@pytest.fixture
def without_operators(monkeypatch):
    """As if Detectron2 were its Python files alone."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "detectron2._C" else find(name)
    )
    for name in ("DeformConv", "ModulatedDeformConv"):
        dummy = deform_conv.create_dummy_class(name, "detectron2._C", "it is not compiled")
        monkeypatch.setattr(resnet, name, dummy)


ADVICE = "DETECTRON2=github python -m dn_detr.install_detectron2"


@pytest.mark.parametrize("is_modulated", [False, True])
@pytest.mark.usefixtures("without_operators")
def test_deformable_convolutions_are_refused_without_operators(cfg, is_modulated):
    """And only where the backbone has them: the thin ResNet does not read the key."""
    model = cfg.MODEL
    model.META_ARCHITECTURE = "DenoisingDETR"
    model.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    model.RESNETS.DEFORM_ON_PER_STAGE = [False, True, True, True]
    model.RESNETS.DEFORM_MODULATED = is_modulated
    with pytest.raises(InputError, match=f"deformable convolutions.*{ADVICE}"):
        Trainer.build_model(cfg)
    model.BACKBONE.NAME = "build_thin_resnet_backbone"
    Trainer.build_model(cfg)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"),
        ("MODEL.ROI_HEADS.NAME", "RROIHeads"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated"),
    ],
)
@pytest.mark.usefixtures("without_operators")
def test_rotated_boxes_are_refused_without_operators(cfg, key, value):
    cfg.merge_from_list([key, value])
    with pytest.raises(InputError, match=f"rotated boxes.*{ADVICE}"):
        Trainer.build_model(cfg)


def test_other_imports_that_fail_are_left_alone(cfg):
    with pytest.raises(ImportError, match="timm") as caught, checked_operators(cfg):
        raise ImportError("No module named 'timm'")
    assert not isinstance(caught.value, InputError)


def test_a_key_that_an_older_detectron2_lacks_may_stand_in_a_configuration_but_not_be_used(
    monkeypatch,
):
    cfg = get_cfg()
    cfg.pop("FLOAT32_PRECISION", None)
    add_dn_detr_config(cfg)
    cfg.merge_from_list(["FLOAT32_PRECISION", "high"])
    monkeypatch.delattr(defaults, "_set_float32_precision", raising=False)
    with pytest.raises(InputError, match=f"FLOAT32_PRECISION needs .*{ADVICE}"):
        Trainer.build_model(cfg)
