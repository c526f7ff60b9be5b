"""DETR."""

from __future__ import annotations

from dn_detr.conversion.name_table import Rule, Table, resnet
from dn_detr.conversion.tables.dense_names import HEADS, decoder_layers, encoder_layers

RULES: dict[str, Rule] = {
    **resnet("backbone.0.body"),
    "input_proj": "neck.projection",
    **encoder_layers(),
    **decoder_layers({"multihead_attn": "cross_attention.attention"}),
    "transformer.decoder.norm": "decoder.predictor.norm",
    **HEADS,
    "query_embed.weight": "query_design.learned.position",
}

TABLES = [Table("facebookresearch/detr", RULES)]
