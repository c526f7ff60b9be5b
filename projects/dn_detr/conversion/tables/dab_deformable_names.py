"""DAB-Deformable-DETR and DN-Deformable-DETR."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dn_detr.conversion.name_table import Rule, Table
from dn_detr.conversion.tables import detrex_names
from dn_detr.conversion.tables.deformable_names import BODY, OWN_HEADS


def content_rows(rows: Tensor) -> dict[str, Tensor]:
    """Pad learned content to [N, C]; that of DN-DETR is [N, C - 1], without the indicator."""
    return {"query_design.learned.content": F.pad(rows, (0, rows.shape[1] % 2))}


RULES: dict[str, Rule] = {
    **BODY,
    **OWN_HEADS,
    "transformer.decoder.query_scale.layers.{}": "decoder.position.scale.layers.{}",
    "transformer.decoder.ref_point_head.layers.{}": "decoder.position.box_mlp.layers.{}",
    "tgt_embed.weight": content_rows,
    "refpoint_embed.weight": "query_design.learned.box_logits",
    "label_enc.weight": "query_design.content.label_embedding.weight",
}

DETREX: dict[str, Rule] = {
    **detrex_names.DEFORMABLE,
    **OWN_HEADS,
    "transformer.decoder.query_scale.layers.{}": "decoder.position.scale.layers.{}",
    "transformer.decoder.ref_point_head.layers.{}": "decoder.position.box_mlp.layers.{}",
    "tgt_embed.weight": content_rows,
    "refpoint_embed.weight": "query_design.learned.box_logits",
    "denoising_generator.label_encoder.weight": "query_design.content.label_embedding.weight",
}

TABLES = [
    Table(
        "IDEA-Research/DAB-DETR and IDEA-Research/DN-DETR",
        RULES,
        optional=frozenset({"label_enc.weight"}),
    ),
    Table("detrex, DN-Deformable-DETR", DETREX),
]
