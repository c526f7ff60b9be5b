"""Dump of an iteration whose loss was not finite, to reproduce it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn


class NonFiniteDump:
    """Write files that `tools/replay_not_finite.py` reads.

    Args:
        folder: Folder of the files.
        config: Configuration of the run as YAML.
    """

    def __init__(self, folder: str, config: str):
        self.folder = folder
        self.config = config

    def keep(self, model: nn.Module, samples: list[dict], **facts) -> Path:
        """Save weights and training samples, before the optimizer step of the iteration.

        Running statistics of batch norm are already updated, but training does not read them.

        Args:
            model: Model with the weights at the start of the iteration.
            samples: Samples of this process.
            **facts: Numbers and strings, including "iteration" and "rank".

        Returns:
            The path of the file.
        """
        path = Path(self.folder) / f"not_finite_{facts['iteration']:07d}_rank{facts['rank']}.pth"
        os.makedirs(self.folder, exist_ok=True)
        torch.save(
            {
                **facts,
                "config": self.config,
                "model": model.state_dict(),
                "samples": [as_plain(sample) for sample in samples],
            },
            path,
        )
        return path


FIELDS = {"gt_boxes": Boxes, "gt_classes": None, "gt_masks": BitMasks, "scores": None}
"""Fields of the instances in training samples, and the class around each tensor."""


def as_plain(sample: dict) -> dict:
    """Convert a training sample to tensors, numbers and strings, which any `torch.load` reads."""
    plain = {key: value for key, value in sample.items() if isinstance(value, int | str)}
    plain["image"] = sample["image"]
    for key, value in sample.items():
        if isinstance(value, Instances):
            fields = value.get_fields()
            objects = {name: fields[name] for name in FIELDS if name in fields}
            plain[key] = {name: getattr(v, "tensor", v) for name, v in objects.items()}
    return plain


def as_sample(plain: dict) -> dict:
    """Convert the result of `as_plain` back to a training sample."""
    sample = dict(plain)
    for key, tensors in plain.items():
        if isinstance(tensors, dict):
            sample[key] = Instances(tuple(plain["image"].shape[-2:]))
            for name, values in tensors.items():
                kind = FIELDS[name]
                sample[key].set(name, kind(values) if kind else values)
    return sample
