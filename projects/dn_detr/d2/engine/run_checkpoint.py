"""Checkpoints of a training: what they hold beside the weights, and what a resume compares."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from yaml import YAMLError

from dn_detr.d2.data.dataset_dicts import load_annotations
from dn_detr.d2.data.teacher_boxes import teacher_files
from dn_detr.d2.engine.checkpoint import DETECTOR, Checkpointer
from dn_detr.d2.engine.collective import raise_on_all_ranks
from dn_detr.d2.engine.run_folder import LAST, iteration_of, remove_old_checkpoints
from dn_detr.datasets.cache import replacing
from dn_detr.errors import InputError, quoted
from dn_detr.safe_yaml import read_yaml

RUN = "run"
"""Key of the facts about a training in its checkpoints, see `facts`."""

FIXED = ("MODEL.META_ARCHITECTURE", "MODEL.DN_DETR.METHOD", "SOLVER.OPTIMIZER")
"""Keys that a resumed training cannot change."""

SILENT = (
    *("OUTPUT_DIR", "VERSION", "MODEL.WEIGHTS", "MODEL.DEVICE", "DATASETS", "TEST", "WANDB"),
    *("LOG_PERIOD", "VIS_PERIOD", "CUDNN_BENCHMARK", "PROCESS_TIMEOUT", "DATALOADER.NUM_WORKERS"),
    *("SOLVER.CHECKPOINT_PERIOD", "SOLVER.CHECKPOINT_MINUTES", "SOLVER.KEEP_NEWEST"),
    *("SOLVER.KEEP_EVERY", "SOLVER.REFERENCE_WORLD_SIZE"),
)
"""Keys, or nodes of keys, that do not change the weights; datasets are compared by content."""


def facts(cfg: CfgNode) -> dict:
    """Return what must or should be equal when a training is resumed.

    Returns:
        "dataset", a hash of images and objects without the folders; "num_images";
        "num_processes".
    """
    digest, num_images, teachers = hashlib.sha256(), 0, teacher_files(cfg)
    for name in cfg.DATASETS.TRAIN:
        truth = load_annotations(name, with_masks=cfg.MODEL.MASK_ON).truth
        for i in range(len(truth)):
            image = truth.image(i)
            file_name = os.path.basename(image["file_name"])
            digest.update(f"{image['image_id']} {file_name}\n".encode())
        outlines = [truth.outlines.data] if cfg.MODEL.MASK_ON else []
        for values in (truth.starts, truth.boxes, truth.labels, truth.is_crowd, *outlines):
            digest.update(np.ascontiguousarray(values))
        if name in teachers:
            digest.update(Path(teachers[name]).read_bytes())
        num_images += len(truth)
    return {
        "dataset": digest.hexdigest(),
        "num_images": num_images,
        "num_processes": comm.get_world_size(),
    }


class RunCheckpointer(Checkpointer):
    """Save and resume a training; see `Checkpointer` for the weights.

    Args:
        *args: Of `Checkpointer`.
        run: `facts` of this training.
        keep_newest: SOLVER.KEEP_NEWEST.
        keep_every: SOLVER.KEEP_EVERY.
        draws_seed: Whether SEED was drawn, so that the checkpoint's is used instead.
        **more: Of `Checkpointer`.
    """

    def __init__(
        self,
        *args,
        run: dict | None = None,
        keep_newest: int = 0,
        keep_every: int = 0,
        draws_seed: bool = False,
        **more,
    ):
        super().__init__(*args, is_for_training=True, **more)
        self.run = run
        self.keep_newest = keep_newest
        self.keep_every = keep_every
        self.draws_seed = draws_seed
        self.resumed = ""

    def save(self, name: str, **kwargs) -> str:
        """Save under a name, and remove checkpoints that need not be kept; returns the path.

        Raises:
            InputError: If it cannot be written; older files are then as they were.
        """
        path = os.path.join(self.save_dir, f"{name}.pth")
        if not self.save_dir or not self.save_to_disk:
            return path
        self.logger.info(f"Saving checkpoint to {path}")
        about = {DETECTOR: self.detector, RUN: self.run}
        content = {
            "model": self.model.state_dict(),
            **{key: value.state_dict() for key, value in self.checkpointables.items()},
            **{key: value for key, value in about.items() if value is not None},
            **kwargs,
        }
        try:
            with replacing(path) as file:
                torch.save(content, file)
            if name != "model_best":  # `--resume` does not use it
                with replacing(os.path.join(self.save_dir, LAST)) as file:
                    file.write(os.path.basename(path).encode())
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise InputError(
                f"the checkpoint {path} cannot be written ({str(reason).splitlines()[0]}); those "
                "before it are as they were."
            ) from error
        iteration = iteration_of(path)
        if iteration is not None:
            keep = {"newest": self.keep_newest, "every": self.keep_every}
            remove_old_checkpoints(self.save_dir, iteration, **keep)
        return path

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """Resume from the newest checkpoint that is not damaged, else load the weights `path`."""
        self.resumed = self.get_checkpoint_file() if resume else ""
        if self.resumed:
            try:
                return self.load(self.resumed)
            except InputError:
                raise
            except (
                LookupError,
                TypeError,
                AttributeError,
                ValueError,
                RuntimeError,
                YAMLError,
            ) as error:
                raise InputError(
                    f"--resume cannot continue {self.resumed!r}, which holds no state of a "
                    f"training that could be read ({type(error).__name__}: {quoted(error)}): to "
                    "start anew from its weights, set MODEL.WEIGHTS to it."
                ) from error
        return self.load(path, checkpointables=[])

    def _load_model(self, checkpoint: dict):
        if self.resumed:
            checkpoint["trainer"]  # a KeyError if it is of weights alone
            changes = raise_on_all_ranks(lambda: list(self._changes(checkpoint)))
            if changes:
                self.logger.warning(f"changed since {self.resumed}: {'; '.join(changes)}")
        return super()._load_model(checkpoint)

    def _changes(self, checkpoint: dict) -> Iterator[str]:
        """Yield what differs from the resumed training.

        Raises:
            InputError: If it cannot differ.
        """
        saved, ours = checkpoint.get(DETECTOR) or {}, self.detector or {}
        names, our_names = saved.get("class_names"), ours.get("class_names")
        if names and our_names and names != our_names:
            raise self._other("classes", ", ".join(names[:5]), ", ".join(our_names[:5]))
        run, our_run = checkpoint.get(RUN) or self.run or {}, self.run or {}
        if run.get("dataset") != our_run.get("dataset"):
            images = [f"{r.get('num_images')} images" for r in (run, our_run)]
            raise self._other("training images or objects", *images)
        if run.get("num_processes") != our_run.get("num_processes"):
            yield (
                f"the number of processes {run['num_processes']} -> {our_run['num_processes']} "
                "(sums are rounded differently)"
            )
        old, new = (flat(read_yaml(about.get("config", "{}"))) for about in (saved, ours))
        for key in sorted(old.keys() & new.keys()):
            is_silent = any(f"{key}.".startswith(f"{node}.") for node in SILENT)
            if old[key] == new[key] or is_silent or (key == "SEED" and self.draws_seed):
                continue
            if key in FIXED:
                raise self._other(key, old[key], new[key])
            yield f"{key} {old[key]} -> {new[key]}"

    def _other(self, what: str, old, new) -> InputError:
        return InputError(
            f"--resume cannot continue {self.resumed!r}, whose training has other {what} ({old}) "
            f"than this one ({new}): to start anew from its weights, set MODEL.WEIGHTS to it and "
            "name another OUTPUT_DIR."
        )


def flat(node: dict, prefix: str = "") -> dict:
    """Return the values of nested dictionaries by dotted key."""
    result = {}
    for key, value in node.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        result.update(inner)
    return result
