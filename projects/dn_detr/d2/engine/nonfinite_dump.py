"""What is kept of an iteration whose loss was not finite, so that it can be computed again."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn


class NonFiniteDump:
    """Writes files into `folder` that `tools/replay_not_finite.py` reads.

    config: of the run, as YAML.
    """

    def __init__(self, folder: str, config: str):
        self.folder = folder
        self.config = config

    def keep(self, model: nn.Module, samples: list[dict], **facts) -> Path:
        """Save weights and training samples; facts: numbers and names (iteration, seed, ...).

        The weights must be those that the iteration began with: the optimizer has not used its
        gradients. Running statistics of batch norm have moved, but training does not read them.
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
"""What training samples have of their objects, and the class around its tensor."""


def as_plain(sample: dict) -> dict:
    """A training sample as tensors, numbers and names, which any torch.load reads."""
    plain = {key: value for key, value in sample.items() if isinstance(value, int | str)}
    plain["image"] = sample["image"]
    for key, value in sample.items():
        if isinstance(value, Instances):
            fields = value.get_fields()
            objects = {name: fields[name] for name in FIELDS if name in fields}
            plain[key] = {name: getattr(v, "tensor", v) for name, v in objects.items()}
    return plain


def as_sample(plain: dict) -> dict:
    """The inverse of `as_plain`."""
    sample = dict(plain)
    for key, tensors in plain.items():
        if isinstance(tensors, dict):
            sample[key] = Instances(tuple(plain["image"].shape[-2:]))
            for name, values in tensors.items():
                kind = FIELDS[name]
                sample[key].set(name, kind(values) if kind else values)
    return sample
