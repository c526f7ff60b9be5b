"""One page per paper. A page is a function (config, in_channels, strides, content) -> DETR.

To add a method, write its page and name it here; nothing else needs to know of it.
"""

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

METHODS = {
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
