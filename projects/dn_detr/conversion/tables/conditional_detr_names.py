"""Conditional DETR."""

from __future__ import annotations

from torch import Tensor

from dn_detr.conversion.name_table import Rule, Table, below, resnet
from dn_detr.conversion.tables import hugging_face_names
from dn_detr.conversion.tables.dense_names import HEADS, conditional_decoder_layers, encoder_layers

QUERIES, GROUPS = 300, 11
"""Of Group DETR (2207.13085), whose files differ from those without groups only in this."""


def position_rows(rows: Tensor) -> dict[str, Tensor]:
    """Split the learned positions of Group DETR [11 * 300, C]: the first group is the model's own,
    the others are the first auxiliary module's.
    """
    own, *others = rows.split(QUERIES) if rows.shape[0] == GROUPS * QUERIES else [rows]
    groups = {f"auxiliary.0.learned.{i}.position": group for i, group in enumerate(others)}
    return {"query_design.learned.position": own, **groups}


RULES: dict[str, Rule] = {
    **resnet("backbone.0.body"),
    "input_proj": "neck.projection",
    **encoder_layers(),
    **conditional_decoder_layers(),
    "transformer.decoder.norm": "decoder.predictor.norm",
    "transformer.decoder.query_scale.layers.{}": "decoder.position.scale.layers.{}",
    "transformer.decoder.ref_point_head.layers.{}": "query_design.point.query_mlp.layers.{}",
    **HEADS,
    "query_embed.weight": position_rows,
}

DECODER_LAYER = below(
    "model.decoder.layers.{}",
    "decoder.layers.{}",
    {
        "sa_qcontent_proj": "self_attention.content_q",
        "sa_kcontent_proj": "self_attention.content_k",
        "sa_qpos_proj": "self_attention.position_q",
        "sa_kpos_proj": "self_attention.position_k",
        "sa_v_proj": "self_attention.v",
        "self_attn.out_proj": "self_attention.out",
        "self_attn_layer_norm": "self_attention.norm",
        "ca_qcontent_proj": "cross_attention.content_q",
        "ca_kcontent_proj": "cross_attention.content_k",
        "ca_qpos_proj": "cross_attention.learned_q",
        "ca_kpos_proj": "cross_attention.position_k",
        "ca_qpos_sine_proj": "cross_attention.spatial_q",
        "ca_v_proj": "cross_attention.v",
        "encoder_attn.out_proj": "cross_attention.out",
        "encoder_attn_layer_norm": "norm",
        "fc1": "feed_forward.expand",
        "fc2": "feed_forward.contract",
        "final_layer_norm": "feed_forward.norm",
    },
)

HUGGING_FACE: dict[str, Rule] = {
    **resnet("model.backbone.conv_encoder.model"),
    **hugging_face_names.CONDITIONAL,
    **DECODER_LAYER,
    "model.decoder.ref_point_head.layers.{}": "query_design.point.query_mlp.layers.{}",
    "class_labels_classifier": "decoder.predictor.heads.class_heads.0",
    "model.query_position_embeddings.weight": "query_design.learned.position",
}

TABLES = [
    Table("Atten4Vis/ConditionalDETR", RULES),
    Table("Hugging Face, ConditionalDetrForObjectDetection", HUGGING_FACE),
]
