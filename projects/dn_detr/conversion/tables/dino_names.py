"""DINO."""

from __future__ import annotations

from dn_detr.conversion.name_table import Rule, Table
from dn_detr.conversion.tables.deformable_names import BODY, PROPOSAL_HEAD, SHARED_HEADS

RULES: dict[str, Rule] = {
    **BODY,
    **SHARED_HEADS,
    # Duplicate heads.
    "transformer.decoder.class_embed.{}": None,
    "transformer.decoder.bbox_embed.{}.layers.{}": None,
    **PROPOSAL_HEAD,
    "transformer.enc_out_class_embed": "query_design.learned.head.class_head",
    "transformer.enc_out_bbox_embed.layers.{}": "query_design.learned.head.box_head.layers.{}",
    "transformer.decoder.norm": "decoder.predictor.norm",
    "transformer.decoder.ref_point_head.layers.{}": "decoder.position.box_mlp.layers.{}",
    "transformer.tgt_embed.weight": "query_design.learned.content",
    "label_enc.weight": "query_design.content.label_embedding.weight",
}

TABLES = [Table("IDEA-Research/DINO", RULES)]
