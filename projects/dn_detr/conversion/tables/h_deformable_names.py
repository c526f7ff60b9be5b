"""H-Deformable-DETR."""

from __future__ import annotations

from torch import Tensor

from dn_detr.conversion.name_table import Rule, Table
from dn_detr.conversion.tables.deformable_names import TWO_STAGE

ONE_TO_MANY = 1500
"""Queries of the one-to-many branch in all published models, which are training-only."""


def content_rows(rows: Tensor) -> dict[str, Tensor]:
    """Split learned content [N + T, C] into the one-to-one branch of N rows, 300 or 900 as
    published, and the one-to-many branch, which is the first auxiliary module.
    """
    count = 900 if rows.shape[0] in (900, 900 + ONE_TO_MANY) else 300
    converted = {"query_design.learned.content": rows[:count]}
    if rows.shape[0] > count:
        converted["auxiliary.0.learned.content"] = rows[count:]
    return converted


RULES: dict[str, Rule] = {**TWO_STAGE, "query_embed.weight": content_rows}

TABLES = [Table("HDETR/H-Deformable-DETR", RULES)]
