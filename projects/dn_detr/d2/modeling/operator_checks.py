"""What a Detectron2 without its compiled operators cannot do (see `install_detectron2`), as a sentence."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.config import CfgNode
from detectron2.engine import defaults

from dn_detr.errors import InputError


def refuse(what: str) -> InputError:
    return InputError(
        f"{what} needs the Detectron2 of GitHub with its compiled operators, which is not installed "
        "here: run `DETECTRON2=github python -m dn_detr.install_detectron2`, or do without."
    )


@contextmanager
def checked_operators(cfg: CfgNode) -> Iterator[None]:
    """Around the building of a model: InputError where it needs what this Detectron2 has not."""
    if cfg.FLOAT32_PRECISION and not hasattr(defaults, "_set_float32_precision"):
        raise refuse("FLOAT32_PRECISION")
    model = cfg.MODEL
    has_rotated = (
        model.PROPOSAL_GENERATOR.NAME == "RRPN"
        or model.ROI_HEADS.NAME == "RROIHeads"
        or "Rotated" in model.ROI_BOX_HEAD.POOLER_TYPE
    )
    if has_rotated and importlib.util.find_spec("detectron2._C") is None:
        raise refuse("a model of rotated boxes")
    try:
        yield
    except ImportError as error:  # of the classes that stand in for deformable convolutions
        if "detectron2._C" not in str(error):
            raise
        raise refuse("MODEL.RESNETS.DEFORM_ON_PER_STAGE (deformable convolutions)") from error
