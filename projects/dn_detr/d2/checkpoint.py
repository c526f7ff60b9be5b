"""Checkpoints: Detectron2's, with a refusal to train or evaluate on weights that do not fit."""

from __future__ import annotations

import os
import pickle
from urllib.error import URLError

from detectron2.checkpoint import DetectionCheckpointer

from dn_detr.errors import InputError

CLASS_DEPENDENT = ("class_heads", "label_table")
"""Parameters whose size is the number of classes: start anew together when it changes."""

TRAINING_ONLY = ("assists", "label_table", "box_embedding")
"""Parameters that only an assist uses: a checkpoint may have them or not."""


def has_part(key: str, parts: tuple[str, ...]) -> bool:
    return any(part in key.split(".") for part in parts)


class Checkpointer(DetectionCheckpointer):
    """Loads a backbone, a detector of the same architecture, or one with other classes.

    A detector's checkpoint that lacks parameters of this model, or has others, is an InputError:
    filling the gaps with random numbers would only show as a low AP. The class heads and the label
    table may differ in the number of classes; they then start anew, both.
    """

    def load(self, path: str, *args, **kwargs) -> dict:
        self.path = path
        if path and "://" not in path and not os.path.isfile(path):
            raise InputError(f"there is no checkpoint {path!r} (MODEL.WEIGHTS)")
        try:
            return super().load(path, *args, **kwargs)
        except (pickle.UnpicklingError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path!r} cannot be loaded safely as a checkpoint: {reason}") from error
        except URLError as error:
            raise InputError(
                f"{path!r} cannot be downloaded ({error.reason}): give a local file as MODEL.WEIGHTS, "
                'or "" to start from random weights'
            ) from error

    def _load_model(self, checkpoint: dict):
        state = checkpoint["model"]
        is_detector = any("core." in key for key in state)
        known = self.model.state_dict()
        changed = {
            key
            for key in state
            if key in known
            and has_part(key, CLASS_DEPENDENT)
            and tuple(state[key].shape) != tuple(known[key].shape)
        }
        if changed:
            for key in [key for key in state if has_part(key, CLASS_DEPENDENT)]:
                del state[key]
        total = len(known)
        incompatible = super()._load_model(checkpoint)
        missing = list(incompatible.missing_keys)
        shapes = [f"{k} {old} instead of {new}" for k, old, new in incompatible.incorrect_shapes]
        if not is_detector:
            if len(missing) + len(shapes) >= total:
                raise InputError(f"{self.path!r} holds none of the parameters of this model")
            return incompatible
        fresh = [key for key in missing if changed and has_part(key, CLASS_DEPENDENT)]
        lacking = [k for k in missing if k not in fresh and not has_part(k, TRAINING_ONLY)]
        surplus = [k for k in incompatible.unexpected_keys if not has_part(k, TRAINING_ONLY)]
        for kind, keys in (("lacks", lacking), ("has also", surplus), ("differs in", shapes)):
            if keys:
                raise InputError(
                    f"{self.path!r} is a checkpoint of another architecture: it {kind} "
                    f"{len(keys)} of {total} parameters, the first being {keys[0]}"
                )
        self.logger.info(
            f"Loaded {total - len(missing)} of {total} parameters from {self.path}"
            + (f"; other classes, so these start anew: {', '.join(fresh)}" if fresh else "")
        )
        return incompatible
