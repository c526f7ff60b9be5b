"""Common rules for the Deformable DETR family, in checkpoints of the authors."""

from __future__ import annotations

from dn_detr.conversion.name_table import Rule, attention, below, resnet
from dn_detr.conversion.tables.dense_names import FEED_FORWARD

SAMPLING = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")

ENCODER: dict[str, Rule] = {
    **resnet("backbone.0.body"),
    "input_proj.{}.{}": "neck.levels.{}.{}",
    "transformer.level_embed": "flatten.level_embedding",
    **below(
        "transformer.encoder.layers.{}",
        "encoder.layers.{}",
        {
            **{f"self_attn.{name}": f"attention.{name}" for name in SAMPLING},
            "norm1": "norm",
            **FEED_FORWARD,
            "norm2": "feed_forward.norm",
        },
    ),
}
"""Backbone, neck and encoder layers."""

BODY: dict[str, Rule] = {
    **ENCODER,
    **attention("transformer.decoder.layers.{}.self_attn", "decoder.layers.{}.self_attention"),
    **below(
        "transformer.decoder.layers.{}",
        "decoder.layers.{}",
        {
            **{f"cross_attn.{name}": f"cross_attention.attention.{name}" for name in SAMPLING},
            "norm2": "self_attention.norm",
            "norm1": "norm",
            **FEED_FORWARD,
            "norm3": "feed_forward.norm",
        },
    ),
}
"""Backbone, neck, encoder and decoder layers."""

OWN_HEADS: dict[str, Rule] = {
    "class_embed.{}": "decoder.predictor.heads.class_heads.{}",
    "bbox_embed.{}.layers.{}": "decoder.predictor.heads.box_heads.{}.layers.{}",
    "transformer.decoder.bbox_embed.{}.layers.{}": None,  # duplicate box heads
}
"""Separate heads for every layer."""

SHARED_HEADS: dict[str, Rule] = {
    "class_embed.0": "decoder.predictor.heads.class_heads.0",
    "class_embed.{}": None,  # identical for every layer
    "bbox_embed.0.layers.{}": "decoder.predictor.heads.box_heads.0.layers.{}",
    "bbox_embed.{}.layers.{}": None,
}
"""Heads shared by all layers; the source repeats them for each layer."""

PROPOSAL_HEAD: dict[str, Rule] = {
    "transformer.enc_output": "query_design.learned.head.project",
    "transformer.enc_output_norm": "query_design.learned.head.norm",
}
"""Projection and norm before the proposal heads."""

TWO_STAGE: dict[str, Rule] = {
    **BODY,
    **PROPOSAL_HEAD,
    "class_embed.6": "query_design.learned.head.class_head",  # after 6 decoder layers
    "bbox_embed.6.layers.{}": "query_design.learned.head.box_head.layers.{}",
    **OWN_HEADS,
    "transformer.decoder.class_embed.{}": None,  # duplicate class heads
    "transformer.pos_trans": "query_design.transform.project",
    "transformer.pos_trans_norm": "query_design.transform.norm",
}
"""Two-stage Deformable DETR."""
