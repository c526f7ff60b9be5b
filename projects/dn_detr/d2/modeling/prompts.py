"""Prompted objects at inference: what a user knows of an image goes in, the names of it come out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from detectron2.structures import Boxes, Instances

from dn_detr.auxiliary.box_prompts import PromptedObjects, add_prompts
from dn_detr.d2.modeling.instances import to_target
from dn_detr.structures import Predictions, Queries, pad_targets


def prompts_from(
    samples: list[dict], num_classes: int, device: torch.device
) -> Callable[[Queries, object], Queries] | None:
    """The prompt of the images of an inference, None where no sample has any.

    A sample may have "prompts": Instances with gt_boxes in pixels of "image" and gt_classes, where
    num_classes is an unknown one.
    """
    if not any("prompts" in sample for sample in samples):
        return None
    targets = [
        to_target(
            sample.get("prompts", _nothing(sample)), num_classes=num_classes + 1, noise_seed=0
        )
        for sample in samples
    ]
    prompts = pad_targets(targets).to(device)
    given = PromptedObjects(labels=prompts.labels, boxes=prompts.boxes, is_given=prompts.is_object)
    return partial(add_prompts, given=given)


def classify_prompts(
    predictions: Predictions, samples: list[dict], *, has_no_object: bool
) -> list[Instances]:
    """What the model takes the box prompts of each image for: pred_classes and scores."""
    logits = predictions.of("prompt").logits[-1]
    scores = logits.softmax(-1)[..., :-1] if has_no_object else logits.sigmoid()
    best, labels = scores.max(-1)
    found = []
    for image, sample in enumerate(samples):
        prompts = sample.get("prompts", _nothing(sample))
        one = Instances(prompts.image_size)
        one.scores, one.pred_classes = best[image, : len(prompts)], labels[image, : len(prompts)]
        found.append(one)
    return found


def _nothing(sample: dict) -> Instances:
    nothing = Instances(tuple(sample["image"].shape[-2:]))
    nothing.gt_boxes = Boxes(torch.zeros(0, 4))
    nothing.gt_classes = torch.zeros(0, dtype=torch.int64)
    return nothing
