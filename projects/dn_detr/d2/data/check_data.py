"""What `dn-detr check` prints: the report of a training, objects by size, what looks wrong."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode

from dn_detr.d2.config.defaults import default_config, read_config
from dn_detr.d2.data import dataset_dicts
from dn_detr.d2.data.augmentation_schedule import build_dense_o2o
from dn_detr.d2.data.catalog import (
    dataset_names,
    is_coco_file,
    leave_out_group,
    read_registered,
    register_all,
    register_coco_format,
)
from dn_detr.d2.data.dataset_folder import SENTENCES
from dn_detr.d2.data.ground_truth import decode
from dn_detr.d2.data.image_check import equal_files, find_faults
from dn_detr.d2.data.plausibility import file_warnings, size_table
from dn_detr.d2.data.summary import num_queries_of, report_on
from dn_detr.errors import InputError


def report(cfg: CfgNode, name: str, *, knows_model: bool) -> str:
    """Load and check a dataset; raises InputError for errors in its files."""
    node = cfg.MODEL.DN_DETR
    return str(
        report_on(
            dataset_dicts.load(name),
            is_for_training=name not in cfg.DATASETS.TEST,
            filters_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            num_queries=num_queries_of(cfg) if knows_model else 0,
            num_groups=node.DENOISING.NUM_GROUPS,
            max_noised=node.DENOISING.MAX_OBJECTS if node.DENOISING.ENABLED else 0,
        )
    )


def write_cleaned(name: str, target: Path) -> str:
    """Write an annotation file without its dropped boxes and with clipped ones as in training.

    Everything else stays. A clipped box without outline gets a new area.
    """
    if not is_coco_file(name):
        raise InputError(f"the dataset {name!r} has no json file to clean.")
    truth = read_registered(name)
    content = decode(Path(truth.source).read_bytes(), dict, truth.source)
    given, kept, num_clipped = content.get("annotations") or [], [], 0
    for n in np.argsort(truth.entries):
        annotation, box = given[truth.entries[n]], truth.boxes[n].tolist()
        if box != annotation["bbox"]:
            num_clipped += 1
            annotation |= {"bbox": box}
            if np.isnan(truth.given_areas[n]):
                annotation["area"] = float(truth.areas[n])
        kept.append(annotation)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({**content, "annotations": kept}), encoding="utf-8")
    except OSError as error:
        raise InputError(f"the cleaned file cannot be written: {error}.") from error
    return f"wrote {target}: {len(given) - len(kept)} boxes dropped, {num_clipped} clipped"


def run(args: argparse.Namespace) -> None:
    """Print everything about the datasets of a command line, see `dn_detr.cli.check`."""
    cfg = read_config(args.config_file, args.opts) if args.config_file else default_config()
    node, names = cfg.DATASETS, list(args.datasets)
    if args.data:
        node.FOLDER, node.IMAGES, node.ANNOTATIONS = args.data, args.images, args.annotations
        node.TRAIN, node.TEST = (), ()
        names += register_all(cfg, eval_only=True)
        print(SENTENCES[node.FOLDER])
    else:
        register_all(cfg)
    for json_file, image_root in args.coco:
        register_coco_format([[json_file, json_file, image_root]])
        names.append(json_file)
    if not names and args.config_file is not None:
        names = dataset_names(cfg)
    if not names:
        raise InputError("name a folder or a dataset, --coco JSON IMAGES, or --config.")
    leave_out_group(names)
    if args.write_cleaned and len(names) != 1:
        raise InputError(f"--write-cleaned is for one dataset, got {len(names)}.")
    warnings, faults, files = [], [], {}
    for name in names:
        print(report(cfg, name, knows_model=args.config_file is not None))
        loaded = dataset_dicts.load(name)
        truth, images, objects = loaded.truth, loaded.images(), ~loaded.truth.is_crowd
        print(size_table(truth.boxes[objects], truth.labels[objects], loaded.class_names))
        warnings += [f"dataset {name}: {warning}" for warning in loaded.warnings]
        files[name] = [image["file_name"] for image in images]
        faults += find_faults(images, decodes=args.decode, shows_progress=True).values()
    warnings += file_warnings(
        files, equal_files([file for part in files.values() for file in part])
    )
    for warning in warnings:
        print(f"warning: {warning}")
    for fault in faults:
        print(f"fault: {fault}")
    if (dense := build_dense_o2o(cfg)) is not None:
        print(dense.describe(cfg.SOLVER.MAX_ITER))
    if args.write_cleaned:
        print(write_cleaned(names[0], args.write_cleaned))
    if faults:
        count = sum(map(len, files.values()))
        raise InputError(f"{len(faults)} of {count} images cannot be used: {faults[0]}")
