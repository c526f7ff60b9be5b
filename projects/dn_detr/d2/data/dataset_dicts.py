"""Loading of datasets: checked, cleaned and counted once, shared between all workers."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from dn_detr.d2.data.catalog import class_names, is_coco_file, read_registered
from dn_detr.d2.data.ground_truth import GroundTruth, describe, with_outlines
from dn_detr.d2.data.plausibility import name_warnings
from dn_detr.d2.data.records import Records, from_dicts
from dn_detr.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class LoadedDataset:
    """A dataset ready for training or evaluation.

    Args:
        name: Name in the catalog.
        truth: Its checked annotations.
        records: Detectron2's dataset dicts, with boxes as xyxy pixels inside their image.
    """

    name: str
    truth: GroundTruth
    records: Records

    @property
    def class_names(self) -> list[str]:
        """Names of the K classes."""
        return self.truth.class_names

    @property
    def warnings(self) -> list[str]:
        """Sentences on what looks wrong in boxes and class names."""
        return name_warnings(self.class_names) + self.truth.warnings

    def images(self) -> list[dict]:
        """Return the dataset dict of every image without its annotations."""
        return [self.records.image(i) for i in range(len(self.records))]

    @cached_property
    def num_objects(self) -> np.ndarray:
        """Boxes of each image without crowd regions, [images] int64."""
        objects = self.truth.image_of_box[~self.truth.is_crowd]
        return np.bincount(objects, minlength=len(self.truth))

    @property
    def class_counts(self) -> np.ndarray:
        """Boxes of each class without crowd regions, [K] int64."""
        objects = self.truth.labels[~self.truth.is_crowd]
        return np.bincount(objects, minlength=len(self.truth.class_names))


def load(name: str, *, check: str = "full", with_masks: bool = False) -> LoadedDataset:
    """Load a registered dataset; a second call returns the same object.

    Args:
        name: Name in the catalog.
        check: DATASETS.CHECK; with "off", faults of boxes are logged, as no report lists them.
        with_masks: Whether to check and keep outlines.

    Raises:
        InputError: If the files are broken or do not fit each other.
    """
    if check not in ("full", "off"):
        raise InputError(f"DATASETS.CHECK must be 'full' or 'off', got {check!r}.")
    loaded = load_annotations(name, with_masks=with_masks)
    if check == "off":
        _warn(loaded)
    return loaded


def load_annotations(name: str, *, with_masks: bool = False) -> LoadedDataset:
    """Load a registered dataset like `load`, without a word."""
    class_names(name)  # refuses names that are not registered
    return _load(name, DatasetCatalog[name], with_masks)


@cache
def _load(name: str, function, with_masks: bool) -> LoadedDataset:
    """Load with `function`, a key of the cache: a re-registered name is loaded again."""
    metadata = MetadataCatalog.get(name)
    folder, originals = "", None
    if is_coco_file(name):
        truth, folder = read_registered(name), metadata.image_root
    else:
        try:
            originals = function()
        except FileNotFoundError as error:
            raise InputError(f"the dataset {name!r} cannot be loaded: {error}.") from error
        if not isinstance(originals, Iterable):
            raise InputError(f"the dataset {name!r} must be a list of dicts, got {originals!r}.")
        if not (originals := list(originals)):
            raise InputError(f"the dataset {name!r} has no images.")
        names = class_names(name)
        ids = metadata.get("thing_dataset_id_to_contiguous_id") or {}
        id_of = {label: category for category, label in ids.items()}
        ids_by_label = [id_of.get(label, label) for label in range(len(names))]
        truth = from_dicts(originals, f"the dataset {name!r}", names, ids_by_label)
    if with_masks:
        truth = with_outlines(truth)
    records = Records(truth, folder, with_masks=with_masks, originals=originals)
    return LoadedDataset(name, truth, records)


@cache
def _warn(loaded: LoadedDataset) -> None:
    """Log the faults of boxes where no report lists them."""
    for line in describe(loaded.truth.findings()):
        logger.warning(f"dataset {loaded.name}: {line}")
