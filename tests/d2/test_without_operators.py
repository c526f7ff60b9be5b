"""A Detectron2 without its compiled operators, or an older one: what works, and what is said."""

import importlib.util

import pytest
from detectron2.config import get_cfg
from detectron2.engine import defaults

from dn_detr.d2 import add_dn_detr_config
from dn_detr.d2.trainer import Trainer
from dn_detr.d2.without_operators import check_operators
from dn_detr.errors import InputError

NEEDY = [
    ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True], "deformable convolutions"),
    ("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN", "rotated boxes"),
    ("MODEL.ROI_HEADS.NAME", "RROIHeads", "rotated boxes"),
    ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated", "rotated boxes"),
]


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.fixture
def has_operators(monkeypatch):
    """has_operators(False): as if Detectron2 were its Python files alone."""
    find = importlib.util.find_spec

    def pretend(answer):
        def find_spec(name, package=None):
            return answer if name == "detectron2._C" else find(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    return pretend


@pytest.mark.parametrize(("key", "value", "words"), NEEDY)
def test_a_model_that_needs_compiled_operators_is_refused_without_them(
    cfg, has_operators, key, value, words
):
    cfg.merge_from_list([key, value])
    has_operators("somewhere")
    check_operators(cfg)
    has_operators(None)
    with pytest.raises(InputError, match=f"{words}.*DETECTRON2=github python -m dn_detr"):
        Trainer.build_model(cfg)


def test_all_else_needs_none(cfg, has_operators):
    has_operators(None)
    check_operators(cfg)


def test_a_key_that_an_older_detectron2_lacks_may_stand_in_a_configuration_but_not_be_used(
    monkeypatch,
):
    cfg = get_cfg()
    cfg.pop("FLOAT32_PRECISION", None)
    add_dn_detr_config(cfg)
    cfg.merge_from_list(["FLOAT32_PRECISION", "high"])
    monkeypatch.delattr(defaults, "_set_float32_precision", raising=False)
    with pytest.raises(InputError, match="FLOAT32_PRECISION need"):
        check_operators(cfg)
