"""Loading of detectors from checkpoints that describe themselves (`checkpoint.describe`)."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from torch import nn
from yaml import YAMLError

from dn_detr.conversion.safe_load import read_pickle
from dn_detr.d2.config.defaults import default_config, merge, merge_opts, read_config
from dn_detr.d2.data.catalog import class_names, register_coco_format
from dn_detr.d2.engine.checkpoint import (
    AVERAGED,
    DETECTOR,
    Checkpointer,
    check_format,
    resolve_weights,
)
from dn_detr.d2.engine.trainer import Trainer
from dn_detr.errors import InputError
from dn_detr.safe_yaml import read_yaml


@dataclass(frozen=True, eq=False)
class SavedDetector:
    """A saved detector in evaluation mode, with its configuration and class names."""

    model: nn.Module
    cfg: CfgNode
    class_names: list[str]


def description_in(path: str) -> dict | None:
    """Read the description of a checkpoint.

    Returns:
        {"config": yaml, "class_names": list}, or None for checkpoints without it: those of earlier
        versions and of Detectron2's model zoo, and converted ones.

    Raises:
        InputError: If the file does not exist or is no checkpoint.
    """
    path = resolve_weights(path).removesuffix(AVERAGED)
    if not os.path.isfile(path):
        raise InputError(f"there is no checkpoint {path!r}.")
    if path.endswith((".pkl", ".safetensors")):
        return None
    try:
        checkpoint = read_pickle(path, mmap=zipfile.is_zipfile(path))  # tensors are not read
    except ValueError as error:
        raise InputError(f"{path!r} cannot be loaded as a checkpoint: {error}.") from error
    about = checkpoint.get(DETECTOR) if isinstance(checkpoint, dict) else None
    if not isinstance(about, dict):
        return None
    check_format(path, checkpoint)
    names = about.setdefault("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"the class names in {path!r} must be a list of strings.")
    return about


def summary_of(path: str) -> str:
    """Say in one line what a checkpoint holds."""
    about = description_in(path)
    if about is None or "config" not in about:
        return f"{path}: parameters without configuration: a backbone, or weights of others"
    cfg, names = read_saved_config(path)
    node, inputs = cfg.MODEL.DN_DETR, cfg.INPUT
    what = cfg.MODEL.META_ARCHITECTURE if node.METHOD == "" else node.METHOD
    return (
        f"{path}: {what}, {node.NUM_QUERIES} queries, images of {inputs.MIN_SIZE_TEST} to "
        f"{inputs.MAX_SIZE_TEST} px, {len(names)} classes: {', '.join(names)}"
    )


def weights_named(config_file: str | None, opts: list[str]) -> str:
    """Return MODEL.WEIGHTS of the pairs `opts` of a command line, else of the config file."""
    pairs = dict(zip(opts[::2], opts[1::2], strict=False))
    path = pairs.get("MODEL.WEIGHTS", "")
    if not path and config_file is not None:
        path = read_config(config_file, list(opts)).MODEL.WEIGHTS
    if not path:
        raise InputError("name the checkpoint as MODEL.WEIGHTS, e.g. MODEL.WEIGHTS model.pth.")
    return path


def read_saved_config(
    path: str,
    *,
    config_file: str | None = None,
    opts: list[str] = (),
    names: list[str] = (),
) -> tuple[CfgNode, list[str]]:
    """Read the configuration and class names of a checkpoint.

    Args:
        path: Checkpoint.
        config_file: Replaces the configuration in the checkpoint; required if it has none.
        opts: Pairs of key and value that override the configuration.
        names: Replaces the class names in the checkpoint. Without names in either place, those of
            the training dataset in the configuration are used.

    Raises:
        InputError: If something is missing, or configuration and names do not fit.
    """
    about = description_in(path)
    if config_file is not None:
        cfg = read_config(config_file, list(opts))
    elif about is not None and "config" in about:
        cfg = default_config()
        saved = _parsed(about, path)
        merge(f"the configuration in {path}", cfg.merge_from_other_cfg, saved)
        cfg.MODEL.WEIGHTS, cfg.MODEL.DN_DETR.BACKBONE_PRETRAINED = "", False
        merge_opts(cfg, list(opts))
    else:
        raise InputError(f"{path!r} holds no configuration: pass the config file of its training.")
    names = list(names) or (about or {}).get("class_names", [])
    if not names:
        register_coco_format(cfg.DATASETS.COCO_FORMAT)
        names = _names_of_dataset(cfg, path)
    node = cfg.MODEL.DN_DETR
    if node.NUM_CLASSES not in (0, len(names)):
        raise InputError(
            f"{path!r} has {node.NUM_CLASSES} classes in its configuration, but {len(names)} class "
            "names: the numbers must be equal."
        )
    node.NUM_CLASSES = len(names)
    return cfg, names


def read_evaluation_config(config_file: str, opts: list[str]) -> CfgNode:
    """Read the configuration for an evaluation of MODEL.WEIGHTS.

    MODEL.DN_DETR.CLASS_NAMES defaults to the class names in the checkpoint.

    Args:
        config_file: Config file; "" takes the configuration in the checkpoint, and writes into
            the folder of the checkpoint unless OUTPUT_DIR is given.
        opts: Pairs of key and value that override it.
    """
    if config_file:
        cfg = read_config(config_file, opts)
    else:
        weights = weights_named(None, opts)
        cfg, _ = read_saved_config(weights, opts=opts)
        if "OUTPUT_DIR" not in opts[::2]:
            cfg.OUTPUT_DIR = os.path.dirname(weights) or "."
    path = cfg.MODEL.WEIGHTS
    node = cfg.MODEL.DN_DETR
    if not node.CLASS_NAMES and os.path.isfile(resolve_weights(path).removesuffix(AVERAGED)):
        about = description_in(path)
        node.CLASS_NAMES = (about or {}).get("class_names", [])
    return cfg


def load_detector(
    path: str,
    *,
    config_file: str | None = None,
    opts: list[str] = (),
    names: list[str] = (),
    device: str | None = None,
) -> SavedDetector:
    """Load the detector of a checkpoint in evaluation mode.

    Args:
        path: Checkpoint.
        config_file: See `read_saved_config`, like opts and names.
        device: Device of the model; None takes MODEL.DEVICE of `opts`, else a GPU if available.
    """
    cfg, names = read_saved_config(path, config_file=config_file, opts=opts, names=names)
    if device is not None:
        cfg.MODEL.DEVICE = device
    elif "MODEL.DEVICE" not in opts:
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.DN_DETR.BACKBONE_PRETRAINED = False  # the checkpoint holds the backbone
    cfg.freeze()
    model = Trainer.build_model(cfg).eval()
    Checkpointer(model).load(path, checkpointables=[])
    return SavedDetector(model, cfg, names)


def _parsed(about: dict, path: str) -> CfgNode:
    """The part of a checkpoint's configuration that describes the detector and its evaluation.

    The rest says where and how it was trained, and a file from elsewhere must not say where to
    write.
    """
    try:
        saved = CfgNode(read_yaml(about["config"]))
        kept = {name: saved[name] for name in ("MODEL", "INPUT", "TEST") if name in saved}
        datasets = saved.get("DATASETS", {})
        names = [name for name in ("TRAIN", "TEST", "COCO_FORMAT") if name in datasets]
        return CfgNode({**kept, "DATASETS": {name: datasets[name] for name in names}})
    except (KeyError, ValueError, TypeError, AttributeError, YAMLError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"the configuration in {path!r} cannot be read: {reason}.") from error


def _names_of_dataset(cfg: CfgNode, path: str) -> list[str]:
    if not cfg.DATASETS.TRAIN:
        raise InputError(f"{path!r} holds no class names: pass them.")
    try:
        return class_names(cfg.DATASETS.TRAIN[0])
    except InputError as error:
        raise InputError(
            f"{path!r} holds no class names: pass them, or register the dataset of its training "
            f"({error})"
        ) from error
