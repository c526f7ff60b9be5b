"""Checkpoints: Detectron2's, with a refusal to train or evaluate on weights that do not fit."""

from __future__ import annotations

import errno
import os
import pickle

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode

from dn_detr.d2.datasets import class_names
from dn_detr.d2.ema import KEY as EMA
from dn_detr.errors import InputError

CLASS_DEPENDENT = ("class_head", "class_heads", "label_table", "cls_score", "bbox_pred")
"""Parameters whose size is the number of classes: start anew together when it changes."""

TRAINING_ONLY = ("assists", "label_table")
"""Parameters that only an assist uses: a checkpoint may have them or not."""

UNFINISHED = ".unfinished"
"""Part of the name of a file that is being written."""

BEST = "model_best.pth"
"""The best one by a metric: no training is resumed from it."""

AVERAGED = f"@{EMA}"
"""At the end of a path: the moving average that the checkpoint holds."""

DETECTOR = "detector"
"""Under this key a checkpoint says which detector it holds."""

UNREADABLE = (pickle.UnpicklingError, EOFError, OSError, RuntimeError, TypeError)
"""What loading a file that is no checkpoint raises."""


def describe(cfg: CfgNode) -> dict:
    """What checkpoints of this training say of their model, in plain types, which
    `torch.load(weights_only=True)` reads."""
    names = [str(name) for name in class_names(cfg.DATASETS.TRAIN[0])]
    return {"config": cfg.dump(), "class_names": names}


def unreadable(path: str, error: Exception) -> str:
    """A sentence for one of `UNREADABLE`."""
    reason = str(error).partition("\n")[0].rstrip(".")
    is_cut_off = isinstance(error, EOFError) or getattr(error, "errno", None) == errno.EINVAL
    # torch's text on pickles advises to load them unsafely.
    if is_cut_off or isinstance(error, pickle.UnpicklingError):
        reason = (
            "it is damaged, or holds other objects than tensors, as files of the original authors do, "
            "which tools/convert_checkpoint.py reads"
        )
    return f"{path!r} cannot be loaded as a checkpoint: {reason}."


def has_part(key: str, parts: tuple[str, ...]) -> bool:
    return any(part in key.split(".") for part in parts)


def is_counter(key: str) -> bool:
    """Whether it is a counter of batch norm: no weight, and filled in by PyTorch where missing."""
    return key.endswith("num_batches_tracked")


class Checkpointer(DetectionCheckpointer):
    """Loads a detector of the same architecture; to begin a training, also a backbone alone or a
    detector with other classes.

    A checkpoint that lacks parameters of this model, or has others, is an InputError: filling the
    gaps with random numbers would only show as a low AP. With other classes (another number, or
    other names) the class heads and the label table start anew, both. Parameters that only training needs may come or be missing.
    """

    def __init__(
        self,
        model,
        save_dir: str = "",
        *,
        is_for_training: bool = False,
        detector: dict | None = None,
        **checkpointables,
    ):
        """`detector` is what files of this checkpointer say of their model: see `describe`."""
        super().__init__(model, save_dir, **checkpointables)
        self.is_for_training = is_for_training
        self.detector = detector

    def save(self, name: str, **kwargs) -> None:
        """Save under a name; a crash while writing leaves an older file of that name as it was."""
        about = {} if self.detector is None else {DETECTOR: self.detector}
        super().save(name + UNFINISHED, **about, **kwargs)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        unfinished = os.path.join(self.save_dir, last_filename_basename)
        finished = unfinished.replace(UNFINISHED, "")
        os.replace(unfinished, finished)
        if os.path.basename(finished) == BEST:
            return
        super().tag_last_checkpoint(os.path.basename(finished))

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        """checkpointables: what else than the model is restored, None = all: that is a resume.

        path: with "@ema" at its end, the moving average of the weights is loaded instead of them.
        """
        self.path = path
        path = path.removesuffix(AVERAGED)
        self.may_start_anew = self.is_for_training and checkpointables is not None
        if path and "://" not in path and not os.path.isfile(path):
            raise InputError(f"there is no checkpoint {path!r}: correct MODEL.WEIGHTS.")
        try:
            return super().load(path, checkpointables)
        except OSError as error:
            raise InputError(
                f"the checkpoint {path!r} cannot be fetched ({error}): give a local file as "
                "MODEL.WEIGHTS, or '' to start from random weights."
            ) from error

    def _load_file(self, filename: str) -> dict:
        """{"model": name -> array, ...}, whatever the file is."""
        try:
            checkpoint = super()._load_file(filename)
        except UNREADABLE as error:
            raise InputError(unreadable(filename, error)) from error
        if self.path.endswith(AVERAGED):
            if EMA not in checkpoint:
                raise InputError(
                    f"{filename!r} holds no moving average of the weights: it was saved without "
                    f"SOLVER.EMA.ENABLED, so leave {AVERAGED!r} out of MODEL.WEIGHTS."
                )
            checkpoint["model"] = checkpoint.pop(EMA)["model"]
        state = checkpoint["model"]
        if not isinstance(state, dict) or not all(hasattr(v, "shape") for v in state.values()):
            raise InputError(f"{filename!r} is not a checkpoint: it must hold arrays by name.")
        return checkpoint

    def _load_model(self, checkpoint: dict):
        state, known = checkpoint["model"], self.model.state_dict()
        is_detector = any(has_part(key, ("core", "roi_heads")) for key in state)
        has_other_classes = self.may_start_anew and self._has_other_classes(checkpoint)
        start_anew = CLASS_DEPENDENT if has_other_classes else ()
        for key in [key for key in state if has_part(key, start_anew)]:
            del state[key]
        incompatible = super()._load_model(checkpoint)
        shapes = [f"{k} {old} instead of {new}" for k, old, new in incompatible.incorrect_shapes]
        missing = [key for key in incompatible.missing_keys if not is_counter(key)]
        total = sum(not is_counter(key) for key in known)
        summary = f"Loaded {total - len(missing) - len(shapes)} of {total} parameters"
        if not is_detector and self.may_start_anew:
            if len(missing) + len(shapes) == total:
                raise InputError(f"{self.path!r} holds none of the parameters of this model.")
            self.logger.info(f"{summary}, a backbone alone")
            return incompatible
        lacking = [k for k in missing if not has_part(k, (*start_anew, *TRAINING_ONLY))]
        surplus = [k for k in incompatible.unexpected_keys if not has_part(k, TRAINING_ONLY)]
        for kind, keys in (("differs in", shapes), ("lacks", lacking), ("has also", surplus)):
            if keys:
                raise InputError(
                    f"{self.path!r} is a checkpoint of another model: it {kind} {len(keys)} of "
                    f"{total} parameters, the first being {keys[0]}."
                )
        if missing:
            because = "other classes" if start_anew else "not in the checkpoint"
            summary += f"; {because}, so these start anew: {', '.join(missing)}"
        self.logger.info(summary)
        return incompatible

    def _has_other_classes(self, checkpoint: dict) -> bool:
        """By their names where both sides know them, and by the sizes of what depends on them."""
        saved, ours = (
            (about or {}).get("class_names") for about in (checkpoint.get(DETECTOR), self.detector)
        )
        if saved and ours and saved != ours:
            return True
        state, known = checkpoint["model"], self.model.state_dict()
        return any(
            tuple(state[key].shape) != tuple(known[key].shape)
            for key in known.keys() & state.keys()
            if has_part(key, CLASS_DEPENDENT)
        )
