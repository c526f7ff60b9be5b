"""One file per paper. It defines a builder (config, in_channels, strides, content) -> DETR.

The annotation of `config` is the dataclass of the hyper-parameters that the method reads;
in_channels and strides (in pixels) describe the backbone features, fine to coarse; content embeds
labels and query content. To add a method, write such a file and list its builder in METHODS.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

from dn_detr.methods.anchor_detr import anchor_detr
from dn_detr.methods.conditional_detr import conditional_detr
from dn_detr.methods.dab_deformable import dab_deformable
from dn_detr.methods.dab_deformable_encoder_only import dab_deformable_encoder_only
from dn_detr.methods.dab_detr import dab_detr
from dn_detr.methods.deformable_detr import (
    deformable_detr,
    deformable_detr_refine,
    deformable_detr_two_stage,
)
from dn_detr.methods.detr import detr
from dn_detr.methods.dino import dino
from dn_detr.methods.h_deformable import h_deformable
from dn_detr.methods.mask2former import mask2former
from dn_detr.methods.mask_dino import mask_dino
from dn_detr.methods.smca import smca, smca_multiscale
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.model_config import ModelConfig

METHODS: dict[str, Callable[..., DETR]] = {
    "detr": detr,
    "conditional_detr": conditional_detr,
    "anchor_detr": anchor_detr,
    "smca": smca,
    "smca_multiscale": smca_multiscale,
    "dab_deformable": dab_deformable,
    "dab_deformable_encoder_only": dab_deformable_encoder_only,
    "dab_detr": dab_detr,
    "deformable_detr": deformable_detr,
    "deformable_detr_refine": deformable_detr_refine,
    "deformable_detr_two_stage": deformable_detr_two_stage,
    "dino": dino,
    "h_deformable": h_deformable,
    "mask2former": mask2former,
    "mask_dino": mask_dino,
}


def config_class(method: str) -> type[ModelConfig]:
    """The dataclass of the hyper-parameters that a method reads.

    Raises:
        ValueError: if there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}, only {sorted(METHODS)}")
    return get_type_hints(METHODS[method])["config"]


def make_config(method: str, **values: Any) -> ModelConfig:
    """Make the hyper-parameters of a method.

    Raises:
        ValueError: for a name that the method does not read, or a value that makes no model.
    """
    kind = config_class(method)
    if unread := values.keys() - {field.name for field in fields(kind)}:
        raise ValueError(f"{method} has no hyper-parameters {sorted(unread)}")
    return kind(**values)
