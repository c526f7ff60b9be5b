"""DAB-DETR and DN-DETR."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dn_detr.conversion.name_table import Rule, Table, attention, below, resnet
from dn_detr.conversion.tables import detrex_names, hugging_face_names
from dn_detr.conversion.tables.dense_names import HEADS, conditional_decoder_layers, encoder_layers


def label_embedding(labels: Tensor) -> dict[str, Tensor]:
    """Convert label embeddings [K + 1, C - 1] of DN-DETR, the last of which, "unknown", is also the
    shared content of matched queries, with indicator 0.
    """
    return {
        "query_design.content.label_embedding.weight": labels,
        "query_design.shared.row": F.pad(labels[-1:], (0, 1)),
    }


QUERIES_AND_HEADS: dict[str, Rule] = {
    "transformer.decoder.norm": "decoder.predictor.norm",
    "transformer.decoder.query_scale.layers.{}": "decoder.position.scale.layers.{}",
    "transformer.decoder.ref_point_head.layers.{}": "decoder.position.box_mlp.layers.{}",
    "transformer.decoder.ref_anchor_head.layers.{}": "decoder.position.size.layers.{}",
    **HEADS,
    "transformer.decoder.bbox_embed.layers.{}": None,  # duplicate box head
    "refpoint_embed.weight": "query_design.learned.anchors",
    "transformer.patterns.weight": "query_design.shared.patterns",
    "label_enc.weight": label_embedding,
}

RULES: dict[str, Rule] = {
    **resnet("backbone.0.body"),
    "input_proj": "neck.projection",
    **encoder_layers(),
    "transformer.encoder.layers.{}.activation": "encoder.layers.{}.feed_forward.activation",
    "transformer.encoder.query_scale.layers.{}": "encoder.scale.layers.{}",
    **conditional_decoder_layers(),
    "transformer.decoder.layers.{}.activation": "decoder.layers.{}.feed_forward.activation",
    **QUERIES_AND_HEADS,
}

# ------------------------------------------------------------------------------------- detrex

DETREX_ENCODER = "transformer.encoder.layers.{}"
DETREX_DECODER = "transformer.decoder.layers.{}"
DETREX_FEED_FORWARD = {
    "ffns.0.layers.0.0": "feed_forward.expand",
    "ffns.0.layers.1": "feed_forward.contract",
    "ffns.0.activation": "feed_forward.activation",
}

DETREX: dict[str, Rule] = {
    **detrex_names.BACKBONE,
    "input_proj": "neck.projection",
    **attention(f"{DETREX_ENCODER}.attentions.0.attn", "encoder.layers.{}.attention"),
    **below(
        DETREX_ENCODER,
        "encoder.layers.{}",
        {**DETREX_FEED_FORWARD, "norms.0": "norm", "norms.1": "feed_forward.norm"},
    ),
    "transformer.encoder.query_scale.layers.{}": "encoder.scale.layers.{}",
    **below(
        DETREX_DECODER,
        "decoder.layers.{}",
        {
            "attentions.0.query_content_proj": "self_attention.content_q",
            "attentions.0.key_content_proj": "self_attention.content_k",
            "attentions.0.query_pos_proj": "self_attention.position_q",
            "attentions.0.key_pos_proj": "self_attention.position_k",
            "attentions.0.value_proj": "self_attention.v",
            "attentions.0.out_proj": "self_attention.out",
            "norms.0": "self_attention.norm",
            "attentions.1.query_content_proj": "cross_attention.content_q",
            "attentions.1.key_content_proj": "cross_attention.content_k",
            "attentions.1.query_pos_proj": "cross_attention.learned_q",
            "attentions.1.key_pos_proj": "cross_attention.position_k",
            "attentions.1.query_pos_sine_proj": "cross_attention.spatial_q",
            "attentions.1.value_proj": "cross_attention.v",
            "attentions.1.out_proj": "cross_attention.out",
            "norms.1": "norm",
            **DETREX_FEED_FORWARD,
            "norms.2": "feed_forward.norm",
        },
    ),
    f"{DETREX_ENCODER}.ffns.0.layers.0.1": None,  # duplicate activation
    f"{DETREX_DECODER}.ffns.0.layers.0.1": None,
    "transformer.decoder.post_norm_layer": "decoder.predictor.norm",
    "transformer.decoder.query_scale.layers.{}": "decoder.position.scale.layers.{}",
    "transformer.decoder.ref_point_head.layers.{}": "decoder.position.box_mlp.layers.{}",
    "transformer.decoder.ref_anchor_head.layers.{}": "decoder.position.size.layers.{}",
    **HEADS,
    "transformer.decoder.bbox_embed.layers.{}": None,  # duplicate box head
    "anchor_box_embed.weight": "query_design.learned.anchors",
    "denoising_generator.label_encoder.weight": label_embedding,
}

# ------------------------------------------------------------------------------- Hugging Face

HUGGING_FACE: dict[str, Rule] = {
    **resnet("model.backbone.conv_encoder.model._backbone"),
    **hugging_face_names.CONDITIONAL,
    "model.encoder.layers.{}.activation_fn": "encoder.layers.{}.feed_forward.activation",
    "model.encoder.query_scale.layers.{}": "encoder.scale.layers.{}",
    **below(
        "model.decoder.layers.{}",
        "decoder.layers.{}",
        {
            "self_attn.self_attn_query_content_proj": "self_attention.content_q",
            "self_attn.self_attn_key_content_proj": "self_attention.content_k",
            "self_attn.self_attn_query_pos_proj": "self_attention.position_q",
            "self_attn.self_attn_key_pos_proj": "self_attention.position_k",
            "self_attn.self_attn_value_proj": "self_attention.v",
            "self_attn.self_attn.output_proj": "self_attention.out",
            "self_attn.self_attn_layer_norm": "self_attention.norm",
            "cross_attn.cross_attn_query_content_proj": "cross_attention.content_q",
            "cross_attn.cross_attn_key_content_proj": "cross_attention.content_k",
            "cross_attn.cross_attn_query_pos_proj": "cross_attention.learned_q",
            "cross_attn.cross_attn_key_pos_proj": "cross_attention.position_k",
            "cross_attn.cross_attn_query_pos_sine_proj": "cross_attention.spatial_q",
            "cross_attn.cross_attn_value_proj": "cross_attention.v",
            "cross_attn.cross_attn.output_proj": "cross_attention.out",
            "cross_attn.cross_attn_layer_norm": "norm",
            "mlp.fc1": "feed_forward.expand",
            "mlp.fc2": "feed_forward.contract",
            "mlp.activation_fn": "feed_forward.activation",
            "mlp.final_layer_norm": "feed_forward.norm",
        },
    ),
    "model.decoder.ref_point_head.layers.{}": "decoder.position.box_mlp.layers.{}",
    "model.decoder.ref_anchor_head.layers.{}": "decoder.position.size.layers.{}",
    "model.decoder.bbox_embed.layers.{}": None,  # duplicate box head
    "class_embed": "decoder.predictor.heads.class_heads.0",
    "model.query_refpoint_embeddings.weight": "query_design.learned.anchors",
    "model.patterns.weight": "query_design.shared.patterns",
}

TABLES = [
    Table(
        "IDEA-Research/DAB-DETR and IDEA-Research/DN-DETR",
        RULES,
        optional=frozenset({"transformer.patterns.weight", "label_enc.weight"}),
    ),
    Table("detrex, DN-DETR", DETREX),
    Table(
        "Hugging Face, DabDetrForObjectDetection",
        HUGGING_FACE,
        optional=frozenset({"model.patterns.weight", "model.decoder.bbox_embed.layers.{}"}),
    ),
]
