"""Dataset registration and the class names of registered datasets."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from dn_detr.d2.data.dataset_folder import use_folder
from dn_detr.d2.data.ground_truth import GroundTruth, read_coco
from dn_detr.d2.data.records import Records
from dn_detr.datasets.shape_drawing import CLASSES
from dn_detr.errors import InputError, quoted


def prepare(cfg, eval_only: bool = False) -> None:
    """Register the datasets of this run and resolve MODEL.DN_DETR.NUM_CLASSES, in place.

    An evaluation with MODEL.DN_DETR.CLASS_NAMES accepts datasets that share some of these classes,
    in any order.
    """
    register_all(cfg, eval_only)
    node = cfg.MODEL.DN_DETR
    names = dataset_names(cfg, eval_only)
    leave_out_group(names)
    if not eval_only or not node.CLASS_NAMES:
        node.NUM_CLASSES = resolve_num_classes(node.NUM_CLASSES, names)
        return
    node.NUM_CLASSES = len(node.CLASS_NAMES)
    for name in names:
        known = class_names(name)
        if set(known).isdisjoint(node.CLASS_NAMES):
            raise InputError(
                f"the model knows none of the classes of the dataset {name!r}: "
                f"{', '.join(known[:5])} are not among {', '.join(node.CLASS_NAMES[:5])}, ..."
            )


def dataset_names(cfg, eval_only: bool = False) -> list[str]:
    """Return the datasets of this run without repetition, training sets first."""
    if eval_only and not cfg.DATASETS.TEST:
        raise InputError("DATASETS.TEST is empty: name at least one dataset to evaluate on.")
    if not eval_only and not cfg.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN is empty: name at least one dataset to train on.")
    train = () if eval_only else cfg.DATASETS.TRAIN
    return list(dict.fromkeys((*train, *cfg.DATASETS.TEST)))


# ----------------------------------------------------------------------------------- registering


def _dicts(name: str) -> list[dict]:
    """Return the dataset dicts of a registered annotation file."""
    return list(Records(read_registered(name), MetadataCatalog.get(name).image_root))


def _register(name: str, json_file: str, image_root: str, **metadata) -> None:
    DatasetCatalog.register(name, partial(_dicts, name))
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata
    )


def is_coco_file(name: str) -> bool:
    """Whether a dataset is an annotation file, not a function of the user's."""
    function = DatasetCatalog[name]
    return getattr(function, "func", None) is _dicts or (
        getattr(function, "__module__", "") == register_coco_instances.__module__
        and function.__qualname__.startswith(f"{register_coco_instances.__qualname__}.")
    )


@cache
def _read_once(name: str, function) -> GroundTruth:  # noqa: ARG001
    """Read the file of a dataset; `function` is a key, as a re-registered name is read again."""
    return read_coco(MetadataCatalog.get(name).json_file)


def read_registered(name: str) -> GroundTruth:
    """Read the annotation file of a registered dataset, and set its metadata as Detectron2 does."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("is_drawn_on_first_use"):
        # A local import: otherwise `python -m dn_detr.datasets.shapes` warns of a second import.
        from dn_detr.datasets.shapes import generate

        generate(Path(metadata.json_file).parents[1], name.removeprefix("shapes_"))
    truth = _read_once(name, DatasetCatalog[name])
    if truth.group is not None and metadata.get("left_out_class") == truth.class_names[truth.group]:
        truth = truth.without_group()
    ids = {category: label for label, category in enumerate(truth.category_ids)}
    known = list(metadata.get("thing_classes", truth.class_names))
    if (known, metadata.get("thing_dataset_id_to_contiguous_id", ids)) != (truth.class_names, ids):
        raise InputError(
            f"{truth.source} has other classes or category ids than the dataset {name!r}: "
            f"{_difference(known, truth.class_names)}."
        )
    metadata.set(thing_classes=known, thing_dataset_id_to_contiguous_id=ids)
    return truth


def leave_out_group(names: Iterable[str]) -> None:
    """Make a class that only groups the others no class of datasets, if none has boxes of it.

    Roboflow adds such a category to its files in COCO format.

    Args:
        names: All datasets that must have the same classes.
    """
    files = [name for name in names if name in DatasetCatalog and is_coco_file(name)]
    if any(MetadataCatalog.get(name).get("thing_classes") for name in files):
        return  # chosen by the user, or known from an earlier call
    truths = [_read_once(name, DatasetCatalog[name]) for name in files]
    groups = {None if t.group is None else t.class_names[t.group] for t in truths}
    for name in files if len(groups) == 1 else ():
        MetadataCatalog.get(name).set(left_out_class=next(iter(groups)))


def register_shapes(root: str | Path | None = None) -> None:
    """Register `shapes_train` and `shapes_val`, whose images are drawn on first load.

    Splits that are already registered stay unchanged.

    Args:
        root: Parent folder; defaults to DETECTRON2_DATASETS, else `datasets`.
    """
    for name in ("shapes_train", "shapes_val"):
        if name in DatasetCatalog:
            continue
        folder = Path(root or os.environ.get("DETECTRON2_DATASETS", "datasets")) / name
        _register(
            name,
            str(folder / "annotations.json"),
            str(folder / "images"),
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
            is_drawn_on_first_use=True,
        )


def register_all(cfg, eval_only: bool = False) -> list[str]:
    """Register everything that a configuration names; DATASETS.FOLDER sets other keys, in place.

    Returns:
        The datasets of DATASETS.FOLDER.
    """
    register_shapes()
    found = use_folder(cfg.DATASETS, eval_only) if cfg.DATASETS.FOLDER else []
    register_coco_format(cfg.DATASETS.COCO_FORMAT)
    return found


def register_coco_format(entries) -> None:
    """Register DATASETS.COCO_FORMAT: a list of [name, json file, image folder], or one such entry.

    Paths may begin with `~`. Files are opened on first use; registering the same entry twice is
    fine.

    Raises:
        InputError: If an entry has another form, or its name is registered with other paths.
    """
    if len(entries) == 3 and all(isinstance(part, str) for part in entries):
        entries = [entries]
    for entry in entries:
        is_triple = isinstance(entry, (list, tuple)) and len(entry) == 3
        if not is_triple or not all(isinstance(part, str) and part for part in entry):
            raise InputError(
                "DATASETS.COCO_FORMAT must be a list of [name, json file, image folder], "
                f"each three strings, got {entry!r}."
            )
        name, json_file, image_root = entry
        json_file, image_root = os.path.expanduser(json_file), os.path.expanduser(image_root)
        if name in DatasetCatalog:
            metadata = MetadataCatalog.get(name)
            taken = (metadata.get("json_file"), metadata.get("image_root"))
            given = (json_file, image_root)
            if [p and os.path.abspath(p) for p in taken] != [os.path.abspath(p) for p in given]:
                raise InputError(
                    f"DATASETS.COCO_FORMAT gives the name {name!r} to {json_file} and {image_root},"
                    f" but {taken[0]} and {taken[1]} have it already: choose another name."
                )
            continue
        _register(name, json_file, image_root)


# --------------------------------------------------------------------------------------- classes


def class_names(name: str) -> list[str]:
    """Return the class names of a registered dataset, in the order of the model's classes.

    They come from the metadata of the dataset, or from its COCO json file.
    """
    if name not in DatasetCatalog:
        similar = difflib.get_close_matches(name, DatasetCatalog.keys(), n=1)
        hint = f"did you mean {similar[0]!r}" if similar else "register it by DATASETS.COCO_FORMAT"
        raise InputError(f"there is no dataset {name!r}: {hint}?")
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        if is_coco_file(name):
            return read_registered(name).class_names
        DatasetCatalog.get(name)  # custom datasets may set their metadata while loading
    if metadata.get("thing_classes") is None:
        raise InputError(
            f"the dataset {name!r} has no class names: set thing_classes in its metadata."
        )
    names = list(metadata.thing_classes)
    if isinstance(metadata.thing_classes, str) or not all(isinstance(n, str) for n in names):
        raise InputError(
            f"thing_classes of the dataset {name!r} must be a list of names, got "
            f"{quoted(metadata.thing_classes)}."
        )
    return names


def resolve_num_classes(configured: int, names: list[str]) -> int:
    """Return the number of classes of a run.

    Args:
        configured: MODEL.DN_DETR.NUM_CLASSES; 0 takes the number from the datasets.
        names: Registered datasets.

    Raises:
        InputError: If the datasets have different classes, or not `configured` many.
    """
    first = class_names(names[0])
    for name in names[1:]:
        classes = class_names(name)
        if classes != first:
            raise InputError(
                f"the datasets {names[0]!r} and {name!r} must have the same classes in the same "
                f"order, but {_difference(first, classes)}."
            )
    if configured not in (0, len(first)):
        raise InputError(
            f"MODEL.DN_DETR.NUM_CLASSES is {configured}, but the dataset {names[0]!r} has "
            f"{len(first)} classes: set it to {len(first)}, or to 0 to take it from the dataset."
        )
    return len(first)


def with_num_classes(cfg: CfgNode) -> CfgNode:
    """Replace a MODEL.DN_DETR.NUM_CLASSES of 0 by the classes of the first training dataset.

    The dataset is registered as `prepare` does, so that Detectron2's `build_model` works on any
    configuration.

    Returns:
        `cfg` itself, or a changed copy.

    Raises:
        InputError: If there is no training dataset.
    """
    if cfg.MODEL.DN_DETR.NUM_CLASSES != 0:
        return cfg
    if not cfg.DATASETS.TRAIN:
        raise InputError(
            "MODEL.DN_DETR.NUM_CLASSES is 0 and DATASETS.TRAIN is empty: set the number of "
            "classes, or name a training dataset."
        )
    cfg = cfg.clone()
    cfg.defrost()
    register_all(cfg)
    leave_out_group(cfg.DATASETS.TRAIN)
    cfg.MODEL.DN_DETR.NUM_CLASSES = len(class_names(cfg.DATASETS.TRAIN[0]))
    return cfg


def _difference(first: list[str], second: list[str]) -> str:
    """Describe the first difference between two unequal lists of class names."""
    for i, (ours, theirs) in enumerate(zip(first, second, strict=False)):
        if ours != theirs:
            return f"class {i} is {ours!r} in the first and {theirs!r} in the second"
    return f"the first has {len(first)} and the second {len(second)}"
