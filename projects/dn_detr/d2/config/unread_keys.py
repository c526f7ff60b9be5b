"""Keys that were set although the chosen method does not read them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import fields

from detectron2.config import CfgNode

from dn_detr.errors import InputError
from dn_detr.methods import METHODS, config_class
from dn_detr.safe_yaml import read_yaml

logger = logging.getLogger(__name__)

PREFIX = "MODEL.DN_DETR."

WITHOUT_QUERIES = ("IN_FEATURES", "NUM_GROUPS", "LOSS.", "PAD_OBJECTS_TO")
"""What Faster R-CNN has no use for, beside the hyper-parameters of methods."""


def unread_keys(cfg: CfgNode) -> Iterator[tuple[str, str]]:
    """Keys below MODEL.DN_DETR that this model does not read, and why.

    Keys of parts that are switched off (TEACH, HYBRID, ...) count as read. Other meta-architectures
    than this project's are not judged.
    """
    node = cfg.MODEL.DN_DETR
    names = {field.name for method in METHODS for field in fields(config_class(method))}
    if cfg.MODEL.META_ARCHITECTURE == "DenoisingRCNN":
        own = {"num_classes"}
        who = "DenoisingRCNN"
        for key in WITHOUT_QUERIES:
            yield key, f"{who} does not read it"
    elif cfg.MODEL.META_ARCHITECTURE == "DenoisingDETR" and node.METHOD in METHODS:
        own = {field.name for field in fields(config_class(node.METHOD))}
        who = f"METHOD {node.METHOD!r}"
        loss = f"LOSS.KIND {node.LOSS.KIND!r}"
        if node.LOSS.KIND != "mal":
            yield "LOSS.MAL_GAMMA", f"{loss} does not read it"
        if node.LOSS.KIND != "softmax":
            yield "LOSS.NO_OBJECT_WEIGHT", f"{loss} does not read it"
        else:
            yield "LOSS.FOCAL_", f"{loss} does not read it"
        if not cfg.MODEL.MASK_ON:
            masks = ("LOSS.MASK_", "LOSS.DICE_WEIGHT", "LOSS.COST_MASK", "LOSS.COST_DICE")
            for key in (*masks, "DENOISING.MASKS"):
                yield key, f"{who} predicts no masks"
    else:
        return
    for name in sorted(names - own):
        yield name.upper(), f"{who} does not read it"
    if cfg.MODEL.BACKBONE.NAME != "build_named_backbone":
        yield "BACKBONE", "only MODEL.BACKBONE.NAME 'build_named_backbone' reads it"


def why_unread(cfg: CfgNode, key: str) -> str | None:
    """Why this model does not read a key; None if it does."""
    if not key.startswith(PREFIX):
        return None
    key = key.removeprefix(PREFIX)
    return next((why for k, why in unread_keys(cfg) if key == k or _is_below(key, k)), None)


def check_keys(cfg: CfgNode, default: CfgNode, config_file: str, opts: list[str]) -> None:
    """Check what a user has set against what the model reads.

    Args:
        cfg: the merged configuration.
        default: all keys with their defaults.
        config_file: keys in the file itself (not in its _BASE_) that are not read and differ from
            the default give one warning line.
        opts: pairs of key and value; one that is not read is an error.

    Raises:
        InputError: for the first such key of `opts`.
    """
    for key in map(str, opts[::2]):
        if why := why_unread(cfg, key):
            raise InputError(f"{key} has no effect: {why}.")
    changed = _changed_in(config_file, default.MODEL.DN_DETR)
    ignored = [f"{key} ({why})" for key in changed if (why := why_unread(cfg, key))]
    if ignored:
        logger.warning(f"{config_file} sets keys that have no effect: {', '.join(ignored)}")


def _is_below(key: str, prefix: str) -> bool:
    return prefix[-1] in "._" and key.startswith(prefix)


def _changed_in(config_file: str, default: CfgNode) -> Iterator[str]:
    """Keys of a file itself, below MODEL.DN_DETR, that differ from the default."""
    with open(config_file, encoding="utf-8") as file:
        content = read_yaml(file.read()) or {}
    parts = [(PREFIX, content.get("MODEL", {}).get("DN_DETR", {}), default)]
    for prefix, values, defaults in parts:
        for key, value in values.items():
            if isinstance(value, dict):
                parts.append((f"{prefix}{key}.", value, defaults[key]))
            elif value != defaults[key]:
                yield prefix + key
