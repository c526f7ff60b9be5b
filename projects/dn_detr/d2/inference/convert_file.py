"""Conversion of checkpoint files of other projects, and of published weights by name."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from dn_detr.conversion.convert_weights import convert, keep_coco_classes
from dn_detr.conversion.published_weights import fetch, find_weights
from dn_detr.conversion.safe_load import read_parameters
from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.engine.checkpoint import DETECTOR, FORMAT
from dn_detr.d2.inference.saved_detector import load_detector
from dn_detr.datasets.cache import cache_folder
from dn_detr.errors import InputError

COCO80 = [category["name"] for category in COCO_CATEGORIES if category["isthing"]]


def convert_file(
    source: str | Path,
    destination: str | Path,
    method: str,
    *,
    is_coco: bool = False,
    config_file: str | None = None,
    opts: Sequence[str] = (),
) -> str:
    """Convert a checkpoint of the authors, of detrex or of Hugging Face.

    Args:
        source: File to read.
        destination: File to write.
        method: Its method, a key of `conversion.tables.TABLES`.
        is_coco: Whether to select COCO's 80 categories from raw ids, and name them.
        config_file: Configuration to keep in the result, after a test that it fits.
        opts: KEY, VALUE, ... on top of it.

    Returns:
        A sentence about what was converted.

    Raises:
        InputError: If the file cannot be read or is of something else.
    """
    about = {"format": FORMAT, "as_published": True}
    try:
        state = read_parameters(source)
        ours, table = convert(state, method)
        if is_coco:
            ours = keep_coco_classes(ours, table.empty_classes)
            about["class_names"] = COCO80
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else error
        raise InputError(f"{source}: {reason}.", longest=1000) from error
    if config_file:
        cfg = read_config(config_file, list(opts))
        if method != cfg.MODEL.DN_DETR.METHOD:
            raise InputError(
                f"{config_file} is of the method {cfg.MODEL.DN_DETR.METHOD}, not {method}."
            )
        if not is_coco:
            raise InputError("--config needs class names: add --classes coco80.")
        cfg.MODEL.DN_DETR.NUM_CLASSES, cfg.MODEL.DN_DETR.AS_PUBLISHED = len(COCO80), True
        cfg.MODEL.WEIGHTS = ""
        about["config"] = cfg.dump()
    ours = {name: tensor.contiguous().clone() for name, tensor in ours.items()}
    destination = Path(destination)
    part = destination.with_name(f"{destination.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": ours, DETECTOR: about}, part)
    if config_file:
        try:
            load_detector(str(part), device="cpu")
        except InputError as error:
            part.unlink()
            raise InputError(f"{config_file} does not fit: {error}") from error
    os.replace(part, destination)
    return (
        f"{source}: {len(state)} tensors with the names of {table.source} "
        f"-> {destination}: {len(ours)} tensors"
    )


def fetch_converted(name: str) -> Path:
    """Return published weights as a checkpoint of this project, in the cache folder."""
    weights = find_weights(name)
    path = cache_folder() / "converted" / f"{name}.format{FORMAT}.pth"
    if not path.is_file():
        if not weights.config:
            raise InputError(
                f"{name} cannot be converted: there is no configuration or no table of parameter "
                f"names for it. It is published at {weights.address}."
            )
        source, config_file = fetch(weights), weights.config
        opts = weights.options
        convert_file(source, path, weights.method, is_coco=True, config_file=config_file, opts=opts)
    logging.getLogger(__name__).info(
        f"{name} of {weights.repository} (licence {weights.licence}, AP {weights.ap} as published, "
        f"not tried here): {path}"
    )
    return path
