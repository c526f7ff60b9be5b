"""H-Deformable-DETR."""

from __future__ import annotations

from torch import Tensor

from dn_detr.conversion.name_table import Rule, Table
from dn_detr.conversion.tables.deformable_names import TWO_STAGE

ONE_TO_ONE = 300
"""Queries of the one-to-one branch in all published models; the others are training-only."""


def content_rows(rows: Tensor) -> dict[str, Tensor]:
    """Split learned content [N + T, C] into the one-to-one and the one-to-many branch, which is the
    first auxiliary module.
    """
    converted = {"query_design.learned.content": rows[:ONE_TO_ONE]}
    if rows.shape[0] > ONE_TO_ONE:
        converted["auxiliary.0.learned.content"] = rows[ONE_TO_ONE:]
    return converted


RULES: dict[str, Rule] = {**TWO_STAGE, "query_embed.weight": content_rows}

TABLES = [Table("HDETR/H-Deformable-DETR", RULES)]
