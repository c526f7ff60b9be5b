"""DN-Deformable-DETR with a deformable encoder alone."""

from __future__ import annotations

from dn_detr.conversion.table import Rule, Table
from dn_detr.conversion.tables.dab_detr import label_table
from dn_detr.conversion.tables.deformable import ENCODER
from dn_detr.conversion.tables.dense import HEADS, conditional_decoder_layers

LAYER = "transformer.decoder.layers.{}"

RULES: dict[str, Rule] = {
    **ENCODER,
    **conditional_decoder_layers(),
    f"{LAYER}.ca_out_v_proj": "decoder.layers.{}.cross_attention.out",
    f"{LAYER}.lvl_attn": "decoder.layers.{}.level_weights",
    "transformer.decoder.norm": "decoder.predictor.norm",
    "transformer.decoder.query_scale.layers.{}": "decoder.position.scale.layers.{}",
    "transformer.decoder.ref_point_head.layers.{}": "decoder.position.of_box.layers.{}",
    "transformer.decoder.ref_anchor_head.layers.{}": "decoder.position.size.layers.{}",
    **HEADS,
    "transformer.decoder.bbox_embed.layers.{}": None,  # the box head once more
    "refpoint_embed.weight": "query_design.tables.anchors",
    "transformer.patterns.weight": "query_design.shared.patterns",
    "label_enc.weight": label_table,
}
del RULES[f"{LAYER}.cross_attn.out_proj"]  # its attention has no projections

TABLES = [
    Table(
        "IDEA-Research/DN-DETR", RULES, optional=frozenset({"transformer.patterns.weight"})
    )
]
