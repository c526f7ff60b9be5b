"""Names that the authors' files of Mask2Former and Mask DINO have in common. Both are Detectron2
projects: the backbone's names are ours."""

from __future__ import annotations

from torch import Tensor

from dn_detr.conversion.name_table import Rule, below
from dn_detr.conversion.tables.deformable_names import SAMPLING
from dn_detr.conversion.tables.dense_names import FEED_FORWARD

HEADS, POINTS = 8, 4
"""Of deformable attention, the same in all their files."""


def coarse_first(ours: str) -> dict[str, Rule]:
    """Deformable attention whose levels stand in the opposite order: below one of their modules,
    {name of its linear layer and leaf: rule}."""

    def turned(name: str, coordinates: int) -> Rule:
        def rule(tensor: Tensor) -> dict[str, Tensor]:
            rows = tensor.unflatten(0, (HEADS, -1, POINTS * coordinates))
            return {f"{ours}.{name}": rows.flip(1).flatten(0, 2)}

        return rule

    rules: dict[str, Rule] = {}
    for leaf in ("weight", "bias"):
        rules[f"sampling_offsets.{leaf}"] = turned(f"sampling_offsets.{leaf}", 2)
        rules[f"attention_weights.{leaf}"] = turned(f"attention_weights.{leaf}", 1)
    return {**rules, **{name: f"{ours}.{name}" for name in SAMPLING[2:]}}


BACKBONE: dict[str, Rule] = {
    **{
        name: name
        for conv in ("stem.conv1", "res{}.{}.conv{}", "res{}.{}.shortcut")
        for name in (f"backbone.{conv}", f"backbone.{conv}.norm")
    },
    "criterion.empty_weight": None,
}
"""Detectron2's ResNet, and what is no parameter of a model."""

PIXELS, PREDICTOR = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"

PIXEL_MAP: dict[str, Rule] = below(
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
"""All but the attention."""


def heads(*owners: str) -> dict[str, Rule]:
    """Class, mask and norm, which stand under several names here."""
    names = {
        "decoder_norm": "norm",
        "class_embed": "class_head",
        "mask_embed.layers.{}": "mask_head.layers.{}",
    }
    return {
        f"{PREDICTOR}.{theirs}": [f"{owner}.{name}" for owner in owners]
        for theirs, name in names.items()
    }
