"""Mask DINO with a ResNet and features from fine to coarse (FEATURE_ORDER "low2high", all published
checkpoints with a downsampled level). Its decoder reverses the levels.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dn_detr.conversion.name_table import Rule, Table, attention, below
from dn_detr.conversion.tables.deformable_names import SAMPLING
from dn_detr.conversion.tables.dense_names import FEED_FORWARD
from dn_detr.conversion.tables.masks_names import (
    BACKBONE,
    ENCODER,
    MASK_FEATURES,
    PIXELS,
    PREDICTOR,
    coarse_first,
    heads,
)


def labels(table: Tensor) -> dict[str, Tensor]:
    """Append the row "unknown", which is unused, to a label embedding [K, C]."""
    return {"query_design.content.label_embedding.weight": F.pad(table, (0, 0, 0, 1))}


OWNERS = ("query_design.heads", "decoder.predictor.heads")
THEIRS, OURS = f"{PREDICTOR}.decoder.layers.{{}}", "decoder.layers.{}"

RULES: dict[str, Rule] = {
    **BACKBONE,
    **MASK_FEATURES,
    f"{PIXELS}.input_proj.{{}}.{{}}": "neck.levels.{}.{}",
    f"{PIXELS}.transformer.level_embed": "flatten.level_embedding",
    **ENCODER,
    **below(
        f"{PIXELS}.transformer.encoder.layers.{{}}.self_attn",
        "encoder.layers.{}.attention",
        {name: name for name in SAMPLING},
    ),
    **attention(f"{THEIRS}.self_attn", f"{OURS}.self_attention"),
    **{
        f"{THEIRS}.cross_attn.{name}": rule
        for name, rule in coarse_first(f"{OURS}.cross_attention.attention").items()
    },
    **below(
        THEIRS,
        OURS,
        {
            "norm2": "self_attention.norm",
            "norm1": "norm",
            **FEED_FORWARD,
            "norm3": "feed_forward.norm",
        },
    ),
    **heads(*OWNERS),
    f"{PREDICTOR}._bbox_embed.layers.{{}}": [f"{owner}.box_head.layers.{{}}" for owner in OWNERS],
    # Duplicate heads.
    f"{PREDICTOR}.bbox_embed.{{}}.layers.{{}}": None,
    f"{PREDICTOR}.decoder.bbox_embed.{{}}.layers.{{}}": None,
    f"{PREDICTOR}.decoder.norm": None,
    f"{PREDICTOR}.decoder.ref_point_head.layers.{{}}": "decoder.position.box_mlp.layers.{}",
    f"{PREDICTOR}.enc_output": "query_design.learned.head.project",
    f"{PREDICTOR}.enc_output_norm": "query_design.learned.head.norm",
    f"{PREDICTOR}.label_enc.weight": labels,
}

TABLES = [Table("IDEA-Research/MaskDINO", RULES)]
