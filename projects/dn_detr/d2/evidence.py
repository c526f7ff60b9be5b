"""What is kept of an iteration whose loss was not finite, so that it can be computed again."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from detectron2.structures import Boxes, Instances
from torch import nn


class Evidence:
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


def as_plain(sample: dict) -> dict:
    """A training sample as tensors, numbers and names, which any torch.load reads."""
    instances = sample["instances"]
    plain = {key: value for key, value in sample.items() if isinstance(value, int | str)}
    return {
        **plain,
        "image": sample["image"],
        "gt_boxes": instances.gt_boxes.tensor,
        "gt_classes": instances.gt_classes,
    }


def as_sample(plain: dict) -> dict:
    """The inverse of `as_plain`."""
    sample = {key: plain[key] for key in plain if key not in ("gt_boxes", "gt_classes")}
    instances = Instances(tuple(plain["image"].shape[-2:]))
    instances.gt_boxes = Boxes(plain["gt_boxes"])
    instances.gt_classes = plain["gt_classes"]
    return {**sample, "instances": instances}
