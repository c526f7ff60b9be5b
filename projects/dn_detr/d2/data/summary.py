"""Report on the datasets of a run, logged before its first iteration."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from detectron2.utils import comm

from dn_detr.d2.data import dataset_dicts
from dn_detr.d2.data.augmentation_schedule import build_dense_o2o
from dn_detr.d2.data.catalog import dataset_names
from dn_detr.d2.data.dataset_dicts import LoadedDataset
from dn_detr.d2.data.dataset_folder import SENTENCES
from dn_detr.d2.data.ground_truth import Finding, describe
from dn_detr.d2.data.image_check import check_image_files, equal_files, in_time
from dn_detr.d2.data.plausibility import file_warnings
from dn_detr.d2.data.teacher_boxes import load_teacher_boxes, teacher_files
from dn_detr.d2.engine.collective import run_on_main_rank
from dn_detr.errors import on_one_line

logger = logging.getLogger(__name__)

_NUM_NAMES = 10  # most ids or classes that are listed
_MOST_COMPARED = 5000  # images whose content is compared; `dn-detr check` compares any number
_LONGEST_LINE = 1000  # characters; names may be long


@dataclass(frozen=True)
class DatasetReport:
    """Counts of one dataset, and what they mean for the model.

    Boxes are counted without crowd regions and dropped boxes.

    Args:
        num_queries: Queries of the model; None if it has none, 0 to report on the data only.
        num_groups: Denoising groups; 0 means as many as fit.
        max_noised: Most noised objects in all denoising groups; 0 means no denoising.
    """

    name: str
    is_for_training: bool
    filters_empty: bool
    num_images: int
    num_empty: int
    num_boxes: int
    num_crowd: int
    median_boxes: float
    most_boxes: int
    fullest_image: str
    num_queries: int | None
    num_groups: int
    max_noised: int
    findings: list[Finding]
    category_ids: list[int | str]
    num_classes: int
    unused_classes: list[str]

    def __str__(self) -> str:
        purpose = "training" if self.is_for_training else "evaluation"
        lines = [
            f"dataset {self.name}{f' ({purpose})' if self.num_queries != 0 else ''}",
            f"  images     {self.num_images}, {self.num_empty} without objects"
            f"{self._use_of_empty()}",
            f"  boxes      {self.num_boxes}, plus {self.num_crowd} crowd regions",
            f"  per image  median {self.median_boxes:g}, most {self.most_boxes} "
            f"({self.fullest_image}){self._capacity()}",
            f"  classes    {self.num_classes}{self._ids()}; {self._unused()}",
            *(f"  {line}" for line in describe(self.findings)),
        ]
        return "\n".join(on_one_line(line, _LONGEST_LINE) for line in lines)

    def _use_of_empty(self) -> str:
        if not self.is_for_training or self.num_queries == 0 or not self.num_empty:
            return ""
        if self.filters_empty:
            return " (left out; DATALOADER.FILTER_EMPTY_ANNOTATIONS False trains on them)"
        return " (trained on as negatives)"

    def _capacity(self) -> str:
        """Compare the fullest image with the queries and, in training, with denoising."""
        if self.num_queries == 0:
            return ""
        queries = "" if self.num_queries is None else f"; {self.num_queries} queries"
        if self.num_queries is not None and self.most_boxes > self.num_queries:
            queries += f" can find only {self.num_queries} of them"
        if not self.is_for_training or not self.max_noised or not self.most_boxes:
            return queries
        groups = self.num_groups or max(1, self.max_noised // self.most_boxes)
        capacity = self.max_noised // groups
        if self.most_boxes <= capacity:
            return f"{queries}; {groups} denoising groups hold all"
        return f"{queries}; {groups} denoising groups hold {capacity} at random"

    def _ids(self) -> str:
        if not self.category_ids:
            return ""
        if len(self.category_ids) <= _NUM_NAMES:
            return f", category ids {', '.join(map(str, self.category_ids))}"
        return f", category ids {self.category_ids[0]} to {self.category_ids[-1]}"

    def _unused(self) -> str:
        names, more = self.unused_classes[:_NUM_NAMES], len(self.unused_classes) - _NUM_NAMES
        if not names:
            return "all have boxes"
        return f"without boxes: {', '.join(names)}{f' and {more} more' if more > 0 else ''}"


def report_on(
    loaded: LoadedDataset,
    *,
    is_for_training: bool,
    filters_empty: bool,
    num_queries: int | None,
    num_groups: int,
    max_noised: int,
) -> DatasetReport:
    """Report on a loaded dataset; the other arguments are those of `DatasetReport`."""
    fullest = int(loaded.num_objects.argmax())
    unused = np.flatnonzero(loaded.class_counts == 0)
    return DatasetReport(
        name=loaded.name,
        is_for_training=is_for_training,
        filters_empty=filters_empty,
        num_images=len(loaded.num_objects),
        num_empty=int((loaded.num_objects == 0).sum()),
        num_boxes=int(loaded.num_objects.sum()),
        num_crowd=int(loaded.truth.is_crowd.sum()),
        median_boxes=float(np.median(loaded.num_objects)),
        most_boxes=int(loaded.num_objects[fullest]),
        fullest_image=loaded.records.image(fullest)["file_name"],
        num_queries=num_queries,
        num_groups=num_groups,
        max_noised=max_noised,
        findings=loaded.truth.findings(),
        category_ids=loaded.truth.category_ids,
        num_classes=len(loaded.truth.class_names),
        unused_classes=[loaded.truth.class_names[i] for i in unused],
    )


def num_queries_of(cfg) -> int | None:
    """Return the number of queries of the model, None if it has none."""
    has_none = cfg.MODEL.META_ARCHITECTURE == "DenoisingRCNN"
    return None if has_none else cfg.MODEL.DN_DETR.NUM_QUERIES


def check_datasets(cfg, eval_only: bool = False) -> list[DatasetReport]:
    """Load and check every dataset of this run, and log a report on it.

    Loaders reuse the loaded datasets. With DATASETS.CHECK "off" this returns an empty list, and
    datasets are loaded and cleaned when a loader is built.

    Raises:
        InputError: At the first fault in the files.
    """
    if cfg.DATASETS.FOLDER in SENTENCES:
        logger.info(SENTENCES[cfg.DATASETS.FOLDER])
    if cfg.DATASETS.CHECK == "off":
        return []
    if not eval_only:
        build_dense_o2o(cfg)  # finds an invalid schedule before images are read
    node = cfg.MODEL.DN_DETR
    teachers = {} if eval_only else teacher_files(cfg)
    reports, files = [], {}
    for name in dataset_names(cfg, eval_only):
        loaded = dataset_dicts.load(name, check=cfg.DATASETS.CHECK, with_masks=cfg.MODEL.MASK_ON)
        images = loaded.images()
        check_image_files(
            images,
            name,
            bad_images=cfg.DATALOADER.BAD_IMAGES,
            most=cfg.DATALOADER.MAX_BAD_IMAGES,
            is_for_training=not eval_only and name in cfg.DATASETS.TRAIN,
        )
        files[name] = [image["file_name"] for image in images]
        for warning in loaded.warnings:
            logger.warning(on_one_line(f"dataset {name}: {warning}", _LONGEST_LINE))
        report = report_on(
            loaded,
            is_for_training=not eval_only and name in cfg.DATASETS.TRAIN,
            filters_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            num_queries=num_queries_of(cfg),
            num_groups=node.DENOISING.NUM_GROUPS,
            max_noised=node.DENOISING.MAX_OBJECTS if node.DENOISING.ENABLED else 0,
        )
        logger.info(str(report))
        reports.append(report)
        if name in teachers:
            logger.info(load_teacher_boxes(loaded, teachers[name]).report())
    in_time(
        lambda is_late: [
            logger.warning(on_one_line(warning, _LONGEST_LINE))
            for warning in file_warnings(
                files, equal_files([f for part in files.values() for f in part], _MOST_COMPARED)
            )
        ],
        "equal images are looked for",
    )
    return reports


def check_once(cfg, eval_only: bool = False):
    """Call `check_datasets` on the main rank; an InputError reaches all. Every rank must call this.

    Returns:
        The configuration to continue with; on other ranks DATASETS.CHECK is "off".
    """
    run_on_main_rank(lambda: bool(check_datasets(cfg, eval_only)))
    if comm.is_main_process():
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.CHECK = "off"
    cfg.freeze()
    return cfg
