"""Names in the files of Hugging Face's transformers, as `save_pretrained` writes them."""

from __future__ import annotations

from dn_detr.conversion.table import Rule, below

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
"""A dense encoder layer."""

CONDITIONAL: dict[str, Rule] = {
    **ENCODER_LAYER,
    "model.input_projection": "neck.projection",
    "model.decoder.layernorm": "decoder.predictor.norm",
    "model.decoder.query_scale.layers.{}": "decoder.position.scale.layers.{}",
    "bbox_predictor.layers.{}": "decoder.predictor.heads.box_heads.0.layers.{}",
}
"""What Conditional DETR and DAB-DETR have in common."""
