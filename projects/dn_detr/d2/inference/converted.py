"""Checkpoints of the authors, of detrex and of Hugging Face as those of this project."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from dn_detr.conversion.convert_weights import convert, keep_coco_classes
from dn_detr.conversion.safe_load import read_parameters
from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.engine.checkpoint import DETECTOR, FORMAT
from dn_detr.d2.inference.saved_detector import load_detector
from dn_detr.errors import InputError

COCO80 = [category["name"] for category in COCO_CATEGORIES if category["isthing"]]


def convert_file(
    source: str,
    destination: Path,
    *,
    method: str,
    classes: str = "keep",
    config: str | None = None,
) -> str:
    """Convert a checkpoint; no code from it is executed.

    Args:
        source: File to read (.pth, .pt, .bin, .safetensors, .pkl).
        destination: File to write (.pth).
        method: Key of `TABLES`.
        classes: "coco80" selects COCO's 80 categories from the raw ids 0 to 90, and names them.
        config: Configuration of this model, kept in the result after a test that it fits.

    Returns:
        A sentence on the result.

    Raises:
        InputError: If a parameter is left unmatched, or something does not fit.
    """
    try:
        state = read_parameters(source)
        ours, table = convert(state, method)
        if classes == "coco80":
            ours = keep_coco_classes(ours)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}.") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{source}: {error}.") from error
    about = {"format": FORMAT, "as_published": True}
    if classes == "coco80":
        about["class_names"] = COCO80
    if config:
        about["config"] = described_by(config, method, about)
    ours = {name: tensor.contiguous().clone() for name, tensor in ours.items()}
    destination.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": ours, DETECTOR: about}, destination)
    if config:
        try:
            load_detector(str(destination), device="cpu")
        except InputError as error:
            destination.unlink()
            raise InputError(f"{config} does not fit: {error}") from error
    return (
        f"{source}: {len(state)} tensors with the names of {table.source} "
        f"-> {destination}: {len(ours)} tensors"
    )


def described_by(config_file: str, method: str, about: dict) -> str:
    """Return the configuration as YAML, with the classes of `about` and as published.

    Raises:
        InputError: if it is of another method or leaves the classes open.
    """
    cfg = read_config(config_file, [])
    node = cfg.MODEL.DN_DETR
    if method != node.METHOD:
        raise InputError(f"{config_file} is of the method {node.METHOD}, not {method}.")
    if "class_names" not in about:
        raise InputError("--config needs class names: add --classes coco80.")
    node.NUM_CLASSES, node.AS_PUBLISHED, cfg.MODEL.WEIGHTS = len(COCO80), True, ""
    return cfg.dump()
