"""Deformable DETR: single-stage, with box refinement, two-stage."""

from __future__ import annotations

from torch import Tensor

from dn_detr.conversion.name_table import Rule, Table
from dn_detr.conversion.tables import hugging_face_names
from dn_detr.conversion.tables.deformable_names import BODY, OWN_HEADS, SHARED_HEADS, TWO_STAGE

SOURCE = "fundamentalvision/Deformable-DETR"


def learned_queries(rows: Tensor) -> dict[str, Tensor]:
    """Split learned queries [N, 2 C] into position and content [N, C]."""
    position, content = rows.chunk(2, dim=1)
    return {"query_design.learned.position": position, "query_design.learned.content": content}


QUERIES: dict[str, Rule] = {
    "query_embed.weight": learned_queries,
    "transformer.reference_points": "query_design.point.reference_points",
}

# ------------------------------------------------------------------------------- Hugging Face

HUGGING_FACE_QUERIES: dict[str, Rule] = {
    **hugging_face_names.DEFORMABLE,
    "model.query_position_embeddings.weight": learned_queries,
    "model.reference_points": "query_design.point.reference_points",
}
HUGGING_FACE_PLAIN: dict[str, Rule] = {**HUGGING_FACE_QUERIES, **SHARED_HEADS}
HUGGING_FACE_REFINE: dict[str, Rule] = {
    **HUGGING_FACE_QUERIES,
    "class_embed.{}": "decoder.predictor.heads.class_heads.{}",
    **hugging_face_names.DEFORMABLE_BOX_HEADS,
}
TWICE = frozenset({"class_embed.{}", "bbox_embed.{}.layers.{}"})
"""Heads that a file may contain twice."""

HUGGING_FACE = "Hugging Face, DeformableDetrForObjectDetection"

PLAIN = [
    Table(SOURCE, {**BODY, **SHARED_HEADS, **QUERIES}),
    Table(HUGGING_FACE, HUGGING_FACE_PLAIN, optional=TWICE),
]
REFINE = [
    Table(SOURCE, {**BODY, **OWN_HEADS, **QUERIES}),
    Table(HUGGING_FACE, HUGGING_FACE_REFINE, optional=TWICE - {"class_embed.{}"}),
]
TWO_STAGES = [
    Table(SOURCE, TWO_STAGE),
    Table(HUGGING_FACE, hugging_face_names.DEFORMABLE_TWO_STAGE, optional=TWICE),
]
