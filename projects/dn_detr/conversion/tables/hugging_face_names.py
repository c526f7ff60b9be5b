"""Common rules for checkpoints of Hugging Face transformers (`save_pretrained`)."""

from __future__ import annotations

from dn_detr.conversion.name_table import Rule, below, resnet

ENCODER_LAYER: dict[str, Rule] = below(
    "model.encoder.layers.{}",
    "encoder.layers.{}",
    {
        "self_attn.q_proj": "attention.q",
        "self_attn.k_proj": "attention.k",
        "self_attn.v_proj": "attention.v",
        "self_attn.out_proj": "attention.out",
        "self_attn_layer_norm": "norm",
        "fc1": "feed_forward.expand",
        "fc2": "feed_forward.contract",
        "final_layer_norm": "feed_forward.norm",
    },
)
"""Dense encoder layers."""

CONDITIONAL: dict[str, Rule] = {
    **ENCODER_LAYER,
    "model.input_projection": "neck.projection",
    "model.decoder.layernorm": "decoder.predictor.norm",
    "model.decoder.query_scale.layers.{}": "decoder.position.scale.layers.{}",
    "bbox_predictor.layers.{}": "decoder.predictor.heads.box_heads.0.layers.{}",
}
"""Common rules of Conditional DETR and DAB-DETR."""

SAMPLING = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")

DEFORMABLE: dict[str, Rule] = {
    **resnet("model.backbone.conv_encoder.model"),
    "model.input_proj.{}.{}": "neck.levels.{}.{}",
    "model.level_embed": "flatten.level_embedding",
    **below(
        "model.encoder.layers.{}",
        "encoder.layers.{}",
        {
            **{f"self_attn.{name}": f"attention.{name}" for name in SAMPLING},
            "self_attn_layer_norm": "norm",
            "fc1": "feed_forward.expand",
            "fc2": "feed_forward.contract",
            "final_layer_norm": "feed_forward.norm",
        },
    ),
    **below(
        "model.decoder.layers.{}",
        "decoder.layers.{}",
        {
            "self_attn.q_proj": "self_attention.q",
            "self_attn.k_proj": "self_attention.k",
            "self_attn.v_proj": "self_attention.v",
            "self_attn.out_proj": "self_attention.out",
            "self_attn_layer_norm": "self_attention.norm",
            **{f"encoder_attn.{name}": f"cross_attention.attention.{name}" for name in SAMPLING},
            "encoder_attn_layer_norm": "norm",
            "fc1": "feed_forward.expand",
            "fc2": "feed_forward.contract",
            "final_layer_norm": "feed_forward.norm",
        },
    ),
}
"""Backbone, neck, encoder and decoder layers of Deformable DETR."""

# With box refinement, older files contain the heads twice, newer ones only under "model.decoder".
DEFORMABLE_BOX_HEADS: dict[str, Rule] = {
    "model.decoder.bbox_embed.{}.layers.{}": "decoder.predictor.heads.box_heads.{}.layers.{}",
    "bbox_embed.{}.layers.{}": None,
}

DEFORMABLE_TWO_STAGE: dict[str, Rule] = {
    **DEFORMABLE,
    # Index 6, after the 6 decoder layers, are the proposal heads.
    "model.decoder.class_embed.6": "query_design.learned.head.class_head",
    "model.decoder.class_embed.{}": "decoder.predictor.heads.class_heads.{}",
    "model.decoder.bbox_embed.6.layers.{}": "query_design.learned.head.box_head.layers.{}",
    **DEFORMABLE_BOX_HEADS,
    "class_embed.{}": None,
    "model.enc_output": "query_design.learned.head.project",
    "model.enc_output_norm": "query_design.learned.head.norm",
    "model.pos_trans": "query_design.transform.project",
    "model.pos_trans_norm": "query_design.transform.norm",
}
