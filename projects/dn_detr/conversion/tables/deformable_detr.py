"""Deformable DETR: plain, with refinement, two-stage."""

from __future__ import annotations

from torch import Tensor

from dn_detr.conversion.table import Rule, Table
from dn_detr.conversion.tables.deformable import BODY, OWN_HEADS, SHARED_HEADS, TWO_STAGE

SOURCE = "fundamentalvision/Deformable-DETR"


def slots(rows: Tensor) -> dict[str, Tensor]:
    """Learned slots [N, 2 C]: position, then content."""
    position, content = rows.chunk(2, dim=1)
    return {"query_design.tables.position": position, "query_design.tables.content": content}


SLOTS: dict[str, Rule] = {
    "query_embed.weight": slots,
    "transformer.reference_points": "query_design.point.reference_points",
}

PLAIN = [Table(SOURCE, {**BODY, **SHARED_HEADS, **SLOTS})]
REFINE = [Table(SOURCE, {**BODY, **OWN_HEADS, **SLOTS})]
TWO_STAGES = [Table(SOURCE, TWO_STAGE)]
