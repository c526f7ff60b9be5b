"""Conditional DETR."""

from __future__ import annotations

from dn_detr.conversion.table import Rule, Table, resnet
from dn_detr.conversion.tables.dense import HEADS, conditional_decoder_layers, encoder_layers

RULES: dict[str, Rule] = {
    **resnet("backbone.0.body"),
    "input_proj": "neck.projection",
    **encoder_layers(),
    **conditional_decoder_layers(),
    "transformer.decoder.norm": "decoder.predictor.norm",
    "transformer.decoder.query_scale.layers.{}": "decoder.position.scale.layers.{}",
    "transformer.decoder.ref_point_head.layers.{}": "query_design.point.of_slot.layers.{}",
    **HEADS,
    "query_embed.weight": "query_design.tables.position",
}

TABLES = [Table("Atten4Vis/ConditionalDETR", RULES)]
