"""What a Detectron2 without its compiled operators cannot do (see `install_detectron2`), as a sentence."""

from __future__ import annotations

import importlib.util

from detectron2.config import CfgNode
from detectron2.engine import defaults

from dn_detr.errors import InputError


def check_operators(cfg: CfgNode) -> None:
    """InputError where the model of a configuration needs what this Detectron2 has not."""
    wanted = []
    if importlib.util.find_spec("detectron2._C") is None:
        model = cfg.MODEL
        if any(model.RESNETS.DEFORM_ON_PER_STAGE):
            wanted.append("MODEL.RESNETS.DEFORM_ON_PER_STAGE (deformable convolutions)")
        if (
            model.PROPOSAL_GENERATOR.NAME == "RRPN"
            or model.ROI_HEADS.NAME == "RROIHeads"
            or "Rotated" in model.ROI_BOX_HEAD.POOLER_TYPE
        ):
            wanted.append("MODEL.PROPOSAL_GENERATOR and ROI_HEADS (rotated boxes)")
    if cfg.FLOAT32_PRECISION and not hasattr(defaults, "_set_float32_precision"):
        wanted.append("FLOAT32_PRECISION")
    if wanted:
        raise InputError(
            f"{' and '.join(wanted)} need the Detectron2 of GitHub with its compiled operators, which is "
            "not installed here: run `DETECTRON2=github python -m dn_detr.install_detectron2`, or leave "
            "them at their defaults."
        )
