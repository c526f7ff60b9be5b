"""Convert checkpoints of the authors, detrex or Hugging Face to this project."""

from __future__ import annotations

import torch
from torch import Tensor

from dn_detr.conversion.name_table import Table
from dn_detr.conversion.tables import TABLES

# The 80 COCO categories have ids in 1 to 90.
ABSENT = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_CATEGORIES = tuple(i for i in range(1, 91) if i not in ABSENT)


def convert(state: dict[str, Tensor], method: str) -> tuple[dict[str, Tensor], Table]:
    """Rename the parameters of a checkpoint.

    Args:
        state: source name -> parameter [...].
        method: a key of `TABLES`.

    Returns:
        Our name -> parameter, and the table that was used.

    Raises:
        ValueError: if a parameter has no rule, or a rule that is not optional no parameter; lists
            both for the table that fits best.
    """
    if method not in TABLES:
        raise ValueError(f"there is no table for {method!r}, only for {sorted(TABLES)}")
    results = [(table, *table.apply(state)) for table in TABLES[method]]
    table, ours, unknown, unused = min(results, key=lambda r: len(r[2]) + len(r[3]))
    if unknown or unused:
        raise ValueError(
            f"this is not a checkpoint of {method} from any of "
            f"{[t.source for t in TABLES[method]]}. "
            f"With the names of {table.source}, these parameters have no rule: "
            f"{unknown or 'none'}; and these are missing: {unused or 'none'}"
        )
    return ours, table


def keep_coco_classes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the rows of the 80 COCO categories from class heads and label embeddings.

    Args:
        state: our name -> parameter; heads have 91 or 92 rows of category ids 0 to 90 [91 or 92,
            ...]. A row after 90 ("no object" or "unknown") is kept as the last one. Heads of 80 or
            81 rows have these categories already.

    Raises:
        ValueError: if a head has another number of rows.
    """
    converted = dict(state)
    for name, tensor in state.items():
        if not {"class_heads", "label_embedding", "class_head"} & set(name.split(".")):
            continue
        rows = tensor.shape[0]
        if rows in (1, 80, 81):  # class-agnostic, or selected already
            continue
        if rows not in (91, 92):
            raise ValueError(
                f"{name} must have 91 or 92 rows of COCO category ids, or 80 or 81, got {rows}"
            )
        keep = torch.tensor([*COCO_CATEGORIES, *range(91, rows)])
        converted[name] = tensor[keep]
    return converted
