"""Common rules for checkpoints of detrex."""

from __future__ import annotations

from dn_detr.conversion.name_table import Rule, attention, below

BACKBONE: dict[str, Rule] = {
    "backbone.stem.conv1": "backbone.stem.conv1",
    "backbone.stem.conv1.norm": "backbone.stem.conv1.norm",
    "backbone.res{}.{}.conv{}": "backbone.res{}.{}.conv{}",
    "backbone.res{}.{}.conv{}.norm": "backbone.res{}.{}.conv{}.norm",
    "backbone.res{}.{}.shortcut": "backbone.res{}.{}.shortcut",
    "backbone.res{}.{}.shortcut.norm": "backbone.res{}.{}.shortcut.norm",
}
"""ResNet of Detectron2, with unchanged names."""

SAMPLING = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
FEED_FORWARD = {
    "ffns.0.layers.0.0": "feed_forward.expand",
    "ffns.0.layers.1": "feed_forward.contract",
}

DEFORMABLE: dict[str, Rule] = {
    **BACKBONE,
    "neck.convs.{}.conv": "neck.levels.{}.0",
    "neck.convs.{}.norm": "neck.levels.{}.1",
    "neck.extra_convs.0.conv": "neck.levels.3.0",
    "neck.extra_convs.0.norm": "neck.levels.3.1",
    "transformer.level_embeds": "flatten.level_embedding",
    **below(
        "transformer.encoder.layers.{}",
        "encoder.layers.{}",
        {
            **{f"attentions.0.{name}": f"attention.{name}" for name in SAMPLING},
            **FEED_FORWARD,
            "norms.0": "norm",
            "norms.1": "feed_forward.norm",
        },
    ),
    **attention(
        "transformer.decoder.layers.{}.attentions.0.attn", "decoder.layers.{}.self_attention"
    ),
    **below(
        "transformer.decoder.layers.{}",
        "decoder.layers.{}",
        {
            "norms.0": "self_attention.norm",
            **{f"attentions.1.{name}": f"cross_attention.attention.{name}" for name in SAMPLING},
            "norms.1": "norm",
            **FEED_FORWARD,
            "norms.2": "feed_forward.norm",
        },
    ),
}
"""Backbone, neck, encoder and decoder layers of the Deformable DETR family with 4 levels."""
