"""SMCA, single-scale."""

from __future__ import annotations

from torch import Tensor

from dn_detr.conversion.name_table import Rule, Table, below, resnet
from dn_detr.conversion.tables.dense_names import HEADS, decoder_layers, encoder_layers


def first_guide(leaf: str) -> Rule:
    """Copy the guide norm of the first layer, which the query centres share."""

    def both(tensor: Tensor) -> dict[str, Tensor]:
        owners = ("decoder.layers.0.guide_norm", "query_design.point.norm")
        return {f"{owner}.{leaf}": tensor for owner in owners}

    return both


RULES: dict[str, Rule] = {
    **resnet("backbone.0.body"),
    "input_proj": "neck.projection",
    **encoder_layers(),
    **decoder_layers({"multihead_attn": "cross_attention"}),
    **below(
        "transformer.decoder.layers.{}",
        "decoder.layers.{}",
        {
            "norm4": "guide_norm",
            "point2": "cross_attention.offset",
            "point3": "cross_attention.scale",
        },
    ),
    "transformer.decoder.layers.0.norm4.weight": first_guide("weight"),
    "transformer.decoder.layers.0.norm4.bias": first_guide("bias"),
    "transformer.decoder.layers.0.point1.layers.{}": "query_design.point.mlp.layers.{}",
    "transformer.decoder.norm": "decoder.predictor.norm",
    **HEADS,
    "query_embed.weight": "query_design.learned.position",
}

TABLES = [Table("gaopengcuhk/SMCA-DETR", RULES, empty_classes=1)]
