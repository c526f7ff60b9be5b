"""What is in the datasets of a run, in a few lines before its first iteration."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from dn_detr.d2.data import dataset_dicts
from dn_detr.d2.data.augmentation_schedule import build_dense_o2o
from dn_detr.d2.data.catalog import dataset_names
from dn_detr.d2.data.dataset_dicts import Finding, LoadedDataset, describe
from dn_detr.d2.data.teacher_boxes import load_teacher_boxes, teacher_files
from dn_detr.d2.engine.collective import on_main

logger = logging.getLogger(__name__)

_NUM_NAMES = 10  # as many ids or classes are listed, of more only some


@dataclass(frozen=True)
class DatasetReport:
    """Counts of one dataset, and what they mean for the model that reads it.

    num_queries 0: no model is known, and only the data are spoken of; None: it has no queries.
    num_groups and max_noised are those of denoising (num_groups 0: as many as fit; max_noised 0: no
    denoising). Boxes are counted as they are trained on: without crowd regions and dropped ones.
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
    no_size: Finding
    outside: Finding
    clipped: Finding
    category_ids: list[int]
    num_classes: int
    unused_classes: list[str]

    def __str__(self) -> str:
        purpose = "training" if self.is_for_training else "evaluation"
        lines = [
            f"dataset {self.name}{f' ({purpose})' if self.num_queries != 0 else ''}",
            f"  images     {self.num_images}, {self.num_empty} without objects"
            f"{self._fate_of_empty()}",
            f"  boxes      {self.num_boxes}, beside {self.num_crowd} crowd regions",
            f"  per image  median {self.median_boxes:g}, most {self.most_boxes} "
            f"({self.fullest_image}){self._room_for_boxes()}",
            f"  classes    {self.num_classes}{self._ids()}; {self._unused()}",
            *(f"  {line}" for line in describe(self.no_size, self.outside, self.clipped)),
        ]
        if not self.is_for_training and (self.no_size.count or self.outside.count):
            lines.append(
                "  note       COCO evaluation reads the file itself and counts all its boxes"
            )
        return "\n".join(lines)

    def _fate_of_empty(self) -> str:
        if not self.is_for_training or self.num_queries == 0 or not self.num_empty:
            return ""
        if self.filters_empty:
            return " (left out; DATALOADER.FILTER_EMPTY_ANNOTATIONS False trains on them)"
        return " (trained on as negatives)"

    def _room_for_boxes(self) -> str:
        """What the fullest image means for queries and, in training, for denoising."""
        if self.num_queries == 0:
            return ""
        queries = "" if self.num_queries is None else f"; {self.num_queries} queries"
        if self.num_queries is not None and self.most_boxes > self.num_queries:
            queries += f" can find only {self.num_queries} of them"
        if not self.is_for_training or not self.max_noised or not self.most_boxes:
            return queries
        groups = self.num_groups or max(1, self.max_noised // self.most_boxes)
        room = self.max_noised // groups
        if self.most_boxes <= room:
            return f"{queries}; {groups} denoising groups hold all"
        return f"{queries}; {groups} denoising groups hold {room} at random"

    def _ids(self) -> str:
        if not self.category_ids:
            return ""
        if len(self.category_ids) <= _NUM_NAMES:
            return f", category ids {', '.join(map(str, self.category_ids))}"
        return f", category ids {min(self.category_ids)} to {max(self.category_ids)}"

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
    """The report on a loaded dataset."""
    fullest = int(loaded.num_objects.argmax())
    ids = MetadataCatalog.get(loaded.name).get("thing_dataset_id_to_contiguous_id") or {}
    unused = np.flatnonzero(loaded.class_counts == 0)
    return DatasetReport(
        name=loaded.name,
        is_for_training=is_for_training,
        filters_empty=filters_empty,
        num_images=len(loaded.num_objects),
        num_empty=int((loaded.num_objects == 0).sum()),
        num_boxes=int(loaded.num_objects.sum()),
        num_crowd=loaded.num_crowd,
        median_boxes=float(np.median(loaded.num_objects)),
        most_boxes=int(loaded.num_objects[fullest]),
        fullest_image=loaded.records[fullest]["file_name"],
        num_queries=num_queries,
        num_groups=num_groups,
        max_noised=max_noised,
        no_size=loaded.no_size,
        outside=loaded.outside,
        clipped=loaded.clipped,
        category_ids=sorted(ids),
        num_classes=len(loaded.class_names),
        unused_classes=[loaded.class_names[i] for i in unused],
    )


def num_queries_of(cfg) -> int | None:
    """Number of queries of the model; None where it has none."""
    has_none = cfg.MODEL.META_ARCHITECTURE == "DenoisingRCNN"
    return None if has_none else cfg.MODEL.DN_DETR.NUM_QUERIES


def check_datasets(cfg, eval_only: bool = False) -> list[DatasetReport]:
    """Load, check and log a report on every dataset of this run; loaders reuse what was loaded.

    Raises InputError at the first fault in the files. With DATASETS.CHECK "off" nothing is done
    here: datasets are loaded, and their boxes cleaned, when a loader is built.
    """
    if cfg.DATASETS.CHECK == "off":
        return []
    if not eval_only:
        build_dense_o2o(cfg)  # refuses a schedule that cannot be followed, before images are read
    node = cfg.MODEL.DN_DETR
    teachers = {} if eval_only else teacher_files(cfg)
    reports = []
    for name in dataset_names(cfg, eval_only):
        loaded = dataset_dicts.load(name, check=cfg.DATASETS.CHECK, with_masks=cfg.MODEL.MASK_ON)
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
    return reports


def check_once(cfg, eval_only: bool = False):
    """`check_datasets` in the first process alone; an InputError reaches all. Every process calls it.

    Returns the configuration that this process shall go on with: in the others it checks no more.
    """
    on_main(lambda: bool(check_datasets(cfg, eval_only)))
    if comm.is_main_process():
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.CHECK = "off"
    cfg.freeze()
    return cfg
