"""Mask2Former with a ResNet, for instance segmentation. Its levels are ordered coarse to fine."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dn_detr.conversion.name_table import Rule, Table, attention, below
from dn_detr.conversion.tables.dense_names import FEED_FORWARD
from dn_detr.conversion.tables.masks_names import (
    BACKBONE,
    ENCODER,
    MASK_FEATURES,
    PIXELS,
    PREDICTOR,
    coarse_first,
    heads,
)


def flip_levels(name: str) -> Callable[[Tensor], dict[str, Tensor]]:
    """Make a rule that reverses the level order of an embedding [levels, C]."""
    return lambda rows: {name: rows.flip(0)}


LAYER = "decoder.layers.{}"
ATTENTION = f"{PIXELS}.transformer.encoder.layers.{{}}.self_attn"

RULES: dict[str, Rule] = {
    **BACKBONE,
    **MASK_FEATURES,
    **{f"{PIXELS}.input_proj.{2 - level}.{{}}": f"neck.levels.{level}.{{}}" for level in range(3)},
    f"{PIXELS}.transformer.level_embed": flip_levels("flatten.level_embedding"),
    **ENCODER,
    **{
        f"{ATTENTION}.{name}": rule
        for name, rule in coarse_first("encoder.layers.{}.attention").items()
    },
    **attention(
        f"{PREDICTOR}.transformer_cross_attention_layers.{{}}.multihead_attn",
        f"{LAYER}.cross_attention",
    ),
    f"{PREDICTOR}.transformer_cross_attention_layers.{{}}.norm": f"{LAYER}.norm",
    **attention(
        f"{PREDICTOR}.transformer_self_attention_layers.{{}}.self_attn",
        f"{LAYER}.self_attention",
    ),
    f"{PREDICTOR}.transformer_self_attention_layers.{{}}.norm": f"{LAYER}.self_attention.norm",
    **below(
        f"{PREDICTOR}.transformer_ffn_layers.{{}}",
        LAYER,
        {**FEED_FORWARD, "norm": "feed_forward.norm"},
    ),
    **heads("query_design.heads", "decoder.heads"),
    f"{PREDICTOR}.query_embed.weight": "query_design.learned.position",
    f"{PREDICTOR}.level_embed.weight": flip_levels("decoder.level_embedding"),
}

CONTENT = "query_design.learned.content"

TABLES = [
    Table("facebookresearch/Mask2Former", {**RULES, f"{PREDICTOR}.{name}.weight": CONTENT})
    for name in ("query_feat", "static_query")  # older files have the second name
]
