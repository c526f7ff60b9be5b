"""Configuration keys from the dataclasses of the core: one source for names and defaults."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, TypeVar

from detectron2.config import CfgNode

T = TypeVar("T")


def add_fields(node: CfgNode, kind: type, without: tuple[str, ...] = ()) -> None:
    """Add a key for each field of a dataclass: its name in capitals, with its default.

    Args:
        node: gets the keys.
        kind: the dataclass.
        without: names of fields that are no keys.
    """
    for field in fields(kind):
        if field.name not in without and field.default is not MISSING:
            node[field.name.upper()] = field.default


def read_fields(node: CfgNode, kind: type[T], **others: Any) -> T:
    """Make a dataclass from the keys of `add_fields`; others: fields that are no keys."""
    keys = (field.name for field in fields(kind) if field.name not in others)  # type: ignore[arg-type]
    return kind(**{name: node[name.upper()] for name in keys}, **others)
