"""Common rules for single-scale methods, in checkpoints of the authors."""

from __future__ import annotations

from dn_detr.conversion.name_table import Rule, attention, below

FEED_FORWARD = {"linear1": "feed_forward.expand", "linear2": "feed_forward.contract"}


def encoder_layers(theirs: str = "transformer.encoder.layers.{}") -> dict[str, Rule]:
    """Rules for the layers of a dense encoder."""
    ours = "encoder.layers.{}"
    return {
        **attention(f"{theirs}.self_attn", f"{ours}.attention"),
        **below(theirs, ours, {**FEED_FORWARD, "norm1": "norm", "norm2": "feed_forward.norm"}),
    }


def decoder_layers(
    cross_attention: dict[str, str], theirs: str = "transformer.decoder.layers.{}"
) -> dict[str, Rule]:
    """Rules for decoder layers that add position and content.

    Args:
        cross_attention: source name -> our name.
    """
    ours = "decoder.layers.{}"
    rules = {
        **attention(f"{theirs}.self_attn", f"{ours}.self_attention"),
        **below(
            theirs,
            ours,
            {
                **FEED_FORWARD,
                "norm1": "self_attention.norm",
                "norm2": "norm",
                "norm3": "feed_forward.norm",
            },
        ),
    }
    for name, our_name in cross_attention.items():
        rules.update(attention(f"{theirs}.{name}", f"{ours}.{our_name}"))
    return rules


def conditional_decoder_layers(theirs: str = "transformer.decoder.layers.{}") -> dict[str, Rule]:
    """Rules for decoder layers with separate content and position (Conditional DETR)."""
    return below(
        theirs,
        "decoder.layers.{}",
        {
            "sa_qcontent_proj": "self_attention.content_q",
            "sa_kcontent_proj": "self_attention.content_k",
            "sa_qpos_proj": "self_attention.position_q",
            "sa_kpos_proj": "self_attention.position_k",
            "sa_v_proj": "self_attention.v",
            "self_attn.out_proj": "self_attention.out",
            "norm1": "self_attention.norm",
            "ca_qcontent_proj": "cross_attention.content_q",
            "ca_kcontent_proj": "cross_attention.content_k",
            "ca_qpos_proj": "cross_attention.learned_q",
            "ca_kpos_proj": "cross_attention.position_k",
            "ca_qpos_sine_proj": "cross_attention.spatial_q",
            "ca_v_proj": "cross_attention.v",
            "cross_attn.out_proj": "cross_attention.out",
            "norm2": "norm",
            **FEED_FORWARD,
            "norm3": "feed_forward.norm",
        },
    )


HEADS: dict[str, Rule] = {
    "class_embed": "decoder.predictor.heads.class_heads.0",
    "bbox_embed.layers.{}": "decoder.predictor.heads.box_heads.0.layers.{}",
}
"""Heads shared by all layers."""
