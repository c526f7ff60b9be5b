"""Common rules for Mask2Former and Mask DINO, in checkpoints of the authors. Both are Detectron2
projects, so backbone names do not change.
"""

from __future__ import annotations

from torch import Tensor

from dn_detr.conversion.name_table import Rule, below
from dn_detr.conversion.tables.deformable_names import SAMPLING
from dn_detr.conversion.tables.dense_names import FEED_FORWARD

HEADS, POINTS = 8, 4
"""Of deformable attention, equal in all published checkpoints."""


def coarse_first(ours: str) -> dict[str, Rule]:
    """Rules for deformable attention with reversed levels, by names relative to its module."""

    def flip_levels(name: str, coordinates: int) -> Rule:
        def rule(tensor: Tensor) -> dict[str, Tensor]:
            rows = tensor.unflatten(0, (HEADS, -1, POINTS * coordinates))
            return {f"{ours}.{name}": rows.flip(1).flatten(0, 2)}

        return rule

    rules: dict[str, Rule] = {}
    for leaf in ("weight", "bias"):
        rules[f"sampling_offsets.{leaf}"] = flip_levels(f"sampling_offsets.{leaf}", 2)
        rules[f"attention_weights.{leaf}"] = flip_levels(f"attention_weights.{leaf}", 1)
    return {**rules, **{name: f"{ours}.{name}" for name in SAMPLING[2:]}}


BACKBONE: dict[str, Rule] = {
    **{
        name: name
        for conv in ("stem.conv1", "res{}.{}.conv{}", "res{}.{}.shortcut")
        for name in (f"backbone.{conv}", f"backbone.{conv}.norm")
    },
    "criterion.empty_weight": None,
}
"""ResNet of Detectron2, and a buffer of the criterion."""

PIXELS, PREDICTOR = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"

MASK_FEATURES: dict[str, Rule] = below(
    PIXELS,
    "mask_head",
    {
        "adapter_1": "lateral.0",
        "adapter_1.norm": "lateral.1",
        "layer_1": "output.0",
        "layer_1.norm": "output.1",
        "mask_features": "project",
    },
)

ENCODER: dict[str, Rule] = below(
    f"{PIXELS}.transformer.encoder.layers.{{}}",
    "encoder.layers.{}",
    {"norm1": "norm", **FEED_FORWARD, "norm2": "feed_forward.norm"},
)
"""Encoder layers without their attention."""


def heads(*owners: str) -> dict[str, Rule]:
    """Rules for class head, mask head and norm, which have several owners here."""
    names = {
        "decoder_norm": "norm",
        "class_embed": "class_head",
        "mask_embed.layers.{}": "mask_head.layers.{}",
    }
    return {
        f"{PREDICTOR}.{theirs}": [f"{owner}.{name}" for owner in owners]
        for theirs, name in names.items()
    }
