"""Checks for a Detectron2 without its compiled operators (see `install_detectron2`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.config import CfgNode
from detectron2.engine import defaults

from dn_detr.errors import InputError


def refuse(what: str) -> InputError:
    """Return the error for a feature that needs the compiled operators."""
    return InputError(
        f"{what} needs the Detectron2 of GitHub with its compiled operators, which is not "
        "installed here: run `DETECTRON2=github python -m dn_detr.install_detectron2`, or do "
        "without."
    )


@contextmanager
def checked_operators(cfg: CfgNode) -> Iterator[None]:
    """Raise an InputError if a model built inside the context needs missing operators."""
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
    except ImportError as error:  # raised by Detectron2's dummies of deformable convolutions
        if "detectron2._C" not in str(error):
            raise
        raise refuse("MODEL.RESNETS.DEFORM_ON_PER_STAGE (deformable convolutions)") from error
