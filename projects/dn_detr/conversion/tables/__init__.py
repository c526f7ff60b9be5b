"""Conversion tables of each method, one for each source of checkpoints."""

from dn_detr.conversion.tables import (
    anchor_detr_names,
    conditional_detr_names,
    dab_deformable_encoder_only_names,
    dab_deformable_names,
    dab_detr_names,
    deformable_detr_names,
    detr_names,
    dino_names,
    h_deformable_names,
    mask2former_names,
    mask_dino_names,
    smca_names,
)

TABLES = {
    "detr": detr_names.TABLES,
    "conditional_detr": conditional_detr_names.TABLES,
    "anchor_detr": anchor_detr_names.TABLES,
    "smca": smca_names.TABLES,
    "dab_deformable": dab_deformable_names.TABLES,
    "dab_deformable_encoder_only": dab_deformable_encoder_only_names.TABLES,
    "dab_detr": dab_detr_names.TABLES,
    "deformable_detr": deformable_detr_names.PLAIN,
    "deformable_detr_refine": deformable_detr_names.REFINE,
    "deformable_detr_two_stage": deformable_detr_names.TWO_STAGES,
    "dino": dino_names.TABLES,
    "h_deformable": h_deformable_names.TABLES,
    "mask2former": mask2former_names.TABLES,
    "mask_dino": mask_dino_names.TABLES,
}
