"""Box prompts at inference: objects given with the samples, and the classes predicted for them."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances

from dn_detr.auxiliary.box_prompts import PromptedObjects
from dn_detr.d2.modeling.batch import Batch
from dn_detr.d2.modeling.instances import to_target
from dn_detr.structures import Predictions, pad_targets


def prompts_from(
    samples: list[dict], num_classes: int, device: torch.device
) -> PromptedObjects | None:
    """The given objects of the images of an inference, None where no sample has any.

    Args:
        samples: may have "prompts": Instances with gt_boxes in pixels of "image" and gt_classes,
            of which num_classes means unknown.
        num_classes: K.
        device: of the result.
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
    return PromptedObjects(labels=prompts.labels, boxes=prompts.boxes, is_given=prompts.is_object)


def classify_prompts(
    predictions: Predictions, batch: Batch, *, has_no_object: bool
) -> list[Instances]:
    """The pred_classes and scores that the model predicts for the prompts of each image."""
    logits = predictions.of("prompt").logits[-1]
    scores = logits.softmax(-1)[..., :-1] if has_no_object else logits.sigmoid()
    best, labels = scores.max(-1)
    found = []
    for image, (size, is_given) in enumerate(zip(batch.sizes, batch.prompts.is_given, strict=True)):
        one = Instances(size)
        one.scores, one.pred_classes = best[image, is_given], labels[image, is_given]
        found.append(one)
    return found


def _nothing(sample: dict) -> Instances:
    nothing = Instances(tuple(sample["image"].shape[-2:]))
    nothing.gt_boxes = Boxes(torch.zeros(0, 4))
    nothing.gt_classes = torch.zeros(0, dtype=torch.int64)
    return nothing
