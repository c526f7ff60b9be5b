"""From a checkpoint of the authors (or of detrex, or Hugging Face) to one of this project."""

from __future__ import annotations

import torch
from torch import Tensor

from dn_detr.conversion.name_table import Table
from dn_detr.conversion.tables import TABLES

# The 80 categories of COCO among the 90 numbers of its annotations.
ABSENT = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_CATEGORIES = tuple(i for i in range(1, 91) if i not in ABSENT)


def convert(state: dict[str, Tensor], method: str) -> tuple[dict[str, Tensor], Table]:
    """Parameters under our names, and the table that fitted.

    Every parameter must have a rule and every rule that is not optional a parameter: ValueError
    lists what is left over on either side, by the table that fits best.
    """
    if method not in TABLES:
        raise ValueError(f"there is no table for {method!r}, only for {sorted(TABLES)}")
    results = [(table, *table.apply(state)) for table in TABLES[method]]
    table, ours, unknown, unused = min(results, key=lambda r: len(r[2]) + len(r[3]))
    if unknown or unused:
        raise ValueError(
            f"this is no checkpoint of {method} as known from "
            f"{[t.source for t in TABLES[method]]}. "
            f"By the names of {table.source}, it has parameters without a rule: "
            f"{unknown or 'none'}; and it lacks: {unused or 'none'}"
        )
    return ours, table


def keep_coco_classes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Class heads and label tables of raw COCO numbers (0 to 90) to the 80 categories in order.

    Rows behind number 90 stay, as the last ones: "no object" and "unknown". ValueError where a head
    has not got 91 or 92 rows.
    """
    converted = dict(state)
    for name, tensor in state.items():
        if not {"class_heads", "label_embedding", "class_head"} & set(name.split(".")):
            continue
        rows = tensor.shape[0]
        if rows == 1:  # class-agnostic
            continue
        if rows not in (91, 92):
            raise ValueError(f"{name} must have 91 or 92 rows of raw COCO numbers, got {rows}")
        keep = torch.tensor([*COCO_CATEGORIES, *range(91, rows)])
        converted[name] = tensor[keep]
    return converted
