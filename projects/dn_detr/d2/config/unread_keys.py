"""Keys that were set although nothing reads them with the chosen method and training."""

from __future__ import annotations

import json
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


NOWHERE = (
    *("MODEL.LOAD_PROPOSALS", "DATASETS.PROPOSAL_", "DATASETS.PRECOMPUTED_", "INPUT.MASK_FORMAT"),
    *("DATALOADER.ASPECT_RATIO_GROUPING", "DATALOADER.REPEAT_", "TEST.AUG.", "GLOBAL.HACK"),
    *("SOLVER.BIAS_LR_FACTOR", "SOLVER.WEIGHT_DECAY_BIAS", "TEST.KEYPOINT_OKS_SIGMAS"),
)
"""Detectron2's keys for what this project does not do, or does otherwise."""

OTHER_DETECTORS = (
    *("MODEL.PROPOSAL_GENERATOR.", "MODEL.ANCHOR_GENERATOR.", "MODEL.RPN.", "MODEL.ROI_"),
    *("MODEL.RETINANET.", "MODEL.SEM_SEG_HEAD.", "MODEL.PANOPTIC_FPN.", "MODEL.KEYPOINT_ON"),
    "VIS_PERIOD",
)
"""Detectron2's keys for its own detectors."""

RESIZING = ("INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "INPUT.MAX_SIZE_TRAIN")


def unread_keys(cfg: CfgNode) -> Iterator[tuple[str, str]]:
    """Keys that this model and its training do not read, and why.

    Keys of parts that are switched off (TEACH, HYBRID, ...) count as read. Other meta-architectures
    than this project's are not judged.
    """
    kind, solver, schedule = cfg.MODEL.META_ARCHITECTURE, cfg.SOLVER, cfg.SOLVER.LR_SCHEDULER_NAME
    if kind not in ("DenoisingDETR", "DenoisingRCNN"):
        return
    yield from ((f"{PREFIX}{key}", why) for key, why in _unread_of_method(cfg))
    scheduled, cosine = f"LR_SCHEDULER_NAME {schedule!r} does not read it", "Cosine" in schedule
    for is_unread, why, keys in (
        (True, "nothing reads it", NOWHERE),
        (kind == "DenoisingDETR", f"{kind} does not read it", OTHER_DETECTORS),
        (
            kind == "DenoisingRCNN",
            "MODEL.DN_DETR.NUM_CLASSES replaces it",
            ("MODEL.ROI_HEADS.NUM_CLASSES",),
        ),
        (
            cfg.MODEL.BACKBONE.NAME == "build_named_backbone",
            "MODEL.DN_DETR.BACKBONE does not read it",
            ("MODEL.RESNETS.",),
        ),
        (cfg.INPUT.SCALE_JITTER.ENABLED, "INPUT.SCALE_JITTER replaces it", RESIZING),
        (
            solver.OPTIMIZER != "SGD",
            f"OPTIMIZER {solver.OPTIMIZER!r} does not read it",
            ("SOLVER.MOMENTUM", "SOLVER.NESTEROV"),
        ),
        (cosine, scheduled, ("SOLVER.STEPS", "SOLVER.GAMMA")),
        (not cosine, scheduled, ("SOLVER.BASE_LR_END",)),
        ("Flat" not in schedule, scheduled, ("SOLVER.FLAT_ITERS", "SOLVER.FINAL_ITERS")),
        ("FixedGamma" not in schedule, scheduled, ("SOLVER.NUM_DECAYS",)),
    ):
        if is_unread:
            yield from ((key, why) for key in keys)


def _unread_of_method(cfg: CfgNode) -> Iterator[tuple[str, str]]:
    """Those below MODEL.DN_DETR, without this prefix."""
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
        for key in ("BACKBONE", "BACKBONE_WINDOW"):  # BACKBONE_PRETRAINED False is always true
            yield key, "only MODEL.BACKBONE.NAME 'build_named_backbone' reads it"


def why_unread(cfg: CfgNode, key: str) -> str | None:
    """Why this model does not read a key; None if it does."""
    return next((why for k, why in unread_keys(cfg) if key == k or _is_below(key, k)), None)


def check_keys(cfg: CfgNode, default: CfgNode, config_file: str, opts: list[str]) -> None:
    """Check what a user has set against what the model reads.

    Args:
        cfg: the merged configuration.
        default: all keys with their defaults.
        config_file: keys in the file itself (not in its _BASE_) that are not read and differ from
            the default give one warning line.
        opts: pairs of key and value; one of this project that is not read is an error, those of
            Detectron2 give one warning line.

    Raises:
        InputError: for the first such key of `opts`.
    """
    given = list(map(str, opts[::2]))
    for key in given:
        if key.startswith(PREFIX) and (why := why_unread(cfg, key)):
            raise InputError(f"{key} has no effect: {why}.")
    for where, keys in ((config_file, _changed_in(config_file, default)), ("the command", given)):
        ignored = [f"{key} ({why})" for key in keys if (why := why_unread(cfg, key))]
        if ignored:
            logger.warning(f"{where} sets keys that have no effect: {', '.join(ignored)}")


def _is_below(key: str, prefix: str) -> bool:
    return prefix[-1] in "._" and key.startswith(prefix)


def _changed_in(config_file: str, default: CfgNode) -> Iterator[str]:
    """Keys of a file itself that differ from the default."""
    with open(config_file, encoding="utf-8") as file:
        content = read_yaml(file.read()) or {}
    content.pop("_BASE_", None)
    parts = [("", content, default)]
    for prefix, values, defaults in parts:
        for key, value in values.items():
            if isinstance(value, dict):
                parts.append((f"{prefix}{key}.", value, defaults[key]))
            elif json.dumps(value) != json.dumps(defaults[key]):  # tuples equal lists
                yield prefix + key
