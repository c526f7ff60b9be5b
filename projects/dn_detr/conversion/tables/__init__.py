"""The tables of each page: every page may have several, one for each source of checkpoints."""

from dn_detr.conversion.tables import (
    anchor_detr,
    conditional_detr,
    dab_deformable,
    dab_deformable_encoder_only,
    dab_detr,
    deformable_detr,
    detr,
    dino,
    h_deformable,
    mask2former,
    mask_dino,
    smca,
)

TABLES = {
    "detr": detr.TABLES,
    "conditional_detr": conditional_detr.TABLES,
    "anchor_detr": anchor_detr.TABLES,
    "smca": smca.TABLES,
    "dab_deformable": dab_deformable.TABLES,
    "dab_deformable_encoder_only": dab_deformable_encoder_only.TABLES,
    "dab_detr": dab_detr.TABLES,
    "deformable_detr": deformable_detr.PLAIN,
    "deformable_detr_refine": deformable_detr.REFINE,
    "deformable_detr_two_stage": deformable_detr.TWO_STAGES,
    "dino": dino.TABLES,
    "h_deformable": h_deformable.TABLES,
    "mask2former": mask2former.TABLES,
    "mask_dino": mask_dino.TABLES,
}
