"""DATASETS.FOLDER: a dataset folder becomes entries of DATASETS.COCO_FORMAT, TRAIN and TEST."""

from __future__ import annotations

import re
from pathlib import Path

from detectron2.config import CfgNode

from dn_detr.datasets.folder import read_folder
from dn_detr.errors import InputError

SENTENCES: dict[str, str] = {}
"""DATASETS.FOLDER -> what was recognised in it, for the log of a run, which begins later."""


def use_folder(node: CfgNode, eval_only: bool = False) -> list[str]:
    """Set COCO_FORMAT, TRAIN and TEST of the node DATASETS, in place.

    TRAIN and TEST stay if they name datasets of the folder, as in the configuration that a run has
    saved; otherwise they become train and val, or test where there is no val.

    Returns:
        All datasets of the folder.

    Raises:
        InputError: If the folder is not recognised, or lacks what is needed.
    """
    found = read_folder(node.FOLDER, node.IMAGES, node.ANNOTATIONS)
    path = Path(node.FOLDER).expanduser().absolute()
    stem = re.sub(r"[^\w-]+", "_", (path.parent if path.is_file() else path).resolve().name)
    names = {key: f"{stem}_{key}" for key in found.files}
    entries = [[name, *found.files[key]] for key, name in names.items()]
    if len(node.COCO_FORMAT) == 3 and all(isinstance(part, str) for part in node.COCO_FORMAT):
        node.COCO_FORMAT = [list(node.COCO_FORMAT)]
    others = [entry for entry in node.COCO_FORMAT if entry[0] not in names.values()]
    node.COCO_FORMAT = [*others, *entries]
    if not node.TRAIN or not set(node.TRAIN) <= set(names.values()):
        node.TRAIN = tuple(names[key] for key in ("train",) if key in names)
    if not node.TEST or not set(node.TEST) <= set(names.values()):
        node.TEST = tuple(names[key] for key in ("val", "test") if key in names)[:1]
    if not eval_only and not node.TRAIN:
        raise InputError(f"{found.sentence}: there is nothing to train on.")
    purposes = f"trained on {', '.join(node.TRAIN) or 'nothing'}, tested on {', '.join(node.TEST)}"
    SENTENCES[node.FOLDER] = f"{found.sentence}; {purposes}"
    return [*names.values()]
