"""Which datasets a run uses, under which names, and how many classes they have."""

import os
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from dn_detr.d2.shapes_drawing import CLASSES


def _load_shapes(folder, name):
    from dn_detr.d2.shapes import generate  # here, for `python -m dn_detr.d2.shapes` to be clean

    generate(folder.parent, name.removeprefix("shapes_"))
    return load_coco_json(str(folder / "annotations.json"), str(folder / "images"), name)


def register_shapes(root=None):
    """Register `shapes_train` and `shapes_val` under `root`, drawn when first loaded.

    Default root: DETECTRON2_DATASETS, else `datasets`. Class names and paths are known at once.
    Splits that are registered already are left alone.
    """
    for name in ("shapes_train", "shapes_val"):
        if name in DatasetCatalog:
            continue
        folder = Path(root or os.environ.get("DETECTRON2_DATASETS", "datasets")) / name
        DatasetCatalog.register(name, partial(_load_shapes, folder, name))
        MetadataCatalog.get(name).set(
            json_file=str(folder / "annotations.json"),
            image_root=str(folder / "images"),
            evaluator_type="coco",
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
        )
