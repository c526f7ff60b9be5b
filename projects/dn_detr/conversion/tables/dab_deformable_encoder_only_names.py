"""DN-Deformable-DETR, deformable in the encoder only."""

from __future__ import annotations

from dn_detr.conversion.name_table import Rule, Table
from dn_detr.conversion.tables.dab_detr_names import QUERIES_AND_HEADS
from dn_detr.conversion.tables.deformable_names import ENCODER
from dn_detr.conversion.tables.dense_names import conditional_decoder_layers

LAYER = "transformer.decoder.layers.{}"

RULES: dict[str, Rule] = {
    **ENCODER,
    **conditional_decoder_layers(),
    f"{LAYER}.ca_out_v_proj": "decoder.layers.{}.cross_attention.out",
    f"{LAYER}.lvl_attn": "decoder.layers.{}.level_weights",
    **QUERIES_AND_HEADS,
}
del RULES[f"{LAYER}.cross_attn.out_proj"]  # not in this model

TABLES = [
    Table("IDEA-Research/DN-DETR", RULES, optional=frozenset({"transformer.patterns.weight"}))
]
