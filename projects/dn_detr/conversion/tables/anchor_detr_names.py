"""Anchor DETR with one feature level and row-column attention."""

from __future__ import annotations

from torch import Tensor

from dn_detr.conversion.name_table import Rule, Table, attention, below, resnet

FEED_FORWARD = {
    "ffn.linear1": "feed_forward.expand",
    "ffn.linear2": "feed_forward.contract",
    "ffn.norm2": "feed_forward.norm",
}


def row_column(theirs: str, ours: str) -> dict[str, Rule]:
    """Rules for row-column attention, whose five projections are stacked in the source."""
    parts = ("x_q", "y_q", "x_k", "y_k", "v")
    return {
        f"{theirs}.in_proj_weight": tuple(f"{ours}.{part}.weight" for part in parts),
        f"{theirs}.in_proj_bias": tuple(f"{ours}.{part}.bias" for part in parts),
        f"{theirs}.out_proj": f"{ours}.out",
    }


def axis(layer: int, ours: int) -> dict[str, Rule]:
    """Rules for the coordinate MLP, which encoder and decoder share."""

    def shared(leaf: str) -> Rule:
        def both(tensor: Tensor) -> dict[str, Tensor]:
            owners = ("encoder.axis", "decoder.position.axis")
            return {f"{owner}.mlp.layers.{ours}.{leaf}": tensor for owner in owners}

        return both

    return {f"transformer.adapt_pos1d.{layer}.{leaf}": shared(leaf) for leaf in ("weight", "bias")}


ENCODER, DECODER = "transformer.encoder_layers.{}", "transformer.decoder_layers.{}"

RULES: dict[str, Rule] = {
    **resnet("backbone.body"),
    "input_proj.0.{}": "neck.projection.{}",
    **row_column(f"{ENCODER}.self_attn", "encoder.layers.{}.attention"),
    **below(ENCODER, "encoder.layers.{}", {**FEED_FORWARD, "norm1": "norm"}),
    **attention(f"{DECODER}.self_attn", "decoder.layers.{}.self_attention"),
    **row_column(f"{DECODER}.cross_attn", "decoder.layers.{}.cross_attention.attention"),
    **below(
        DECODER,
        "decoder.layers.{}",
        {**FEED_FORWARD, "norm1": "norm", "norm2": "self_attention.norm"},
    ),
    "transformer.pattern.weight": "query_design.shared.patterns",
    "transformer.position.weight": "query_design.learned.anchors",
    "transformer.adapt_pos2d.0": "decoder.position.point_mlp.layers.0",
    "transformer.adapt_pos2d.2": "decoder.position.point_mlp.layers.1",
    **axis(0, 0),
    **axis(2, 1),
    # The source repeats the shared heads for each layer.
    "transformer.class_embed.0": "decoder.predictor.heads.class_heads.0",
    "transformer.class_embed.{}": None,
    "transformer.bbox_embed.0.layers.{}": "decoder.predictor.heads.box_heads.0.layers.{}",
    "transformer.bbox_embed.{}.layers.{}": None,
}

TABLES = [Table("megvii-research/AnchorDETR", RULES)]
