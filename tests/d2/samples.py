"""Training samples of Detectron2's form, without files; losses of a training."""

import json
from pathlib import Path

import torch
from detectron2.structures import BitMasks, Boxes, Instances

ROUNDING = 256 * torch.finfo(torch.float32).eps
"""How much scores of a tiny float32 detector may differ if its sums come in another order, as in
another batch: some twenty layers, a few roundings each. Boxes: as much of the image's side."""


def sample(image_id: int, num_objects: int, *, height: int = 64, width: int = 96, classes: int = 3):
    """A picture of noise with boxes that follow from `image_id`, filled by their masks."""
    generator = torch.Generator().manual_seed(image_id)
    instances = Instances((height, width))
    corners = torch.rand(num_objects, 2, 2, generator=generator).sort(dim=1).values
    boxes = corners.flatten(1) * torch.tensor([width - 9, height - 9] * 2)
    instances.gt_boxes = Boxes(boxes + torch.tensor([0, 0, 8, 8]))
    instances.gt_classes = torch.randint(classes, (num_objects,), generator=generator)
    masks = torch.zeros(num_objects, height, width, dtype=torch.bool)
    corners = instances.gt_boxes.tensor.round().long().tolist()
    for mask, (x0, y0, x1, y1) in zip(masks, corners, strict=True):
        mask[y0:y1, x0:x1] = True
    instances.gt_masks = BitMasks(masks)
    image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
    return {
        "image": image,
        "instances": instances,
        "image_id": image_id,
        "height": height,
        "width": width,
    }


def with_teacher(sample: dict, num_boxes: int, *, classes: int = 3) -> dict:
    """`sample` with boxes of a teacher, which follow from its image_id."""
    height, width = sample["image"].shape[1:]
    generator = torch.Generator().manual_seed(1000 + sample["image_id"])
    taught = Instances((height, width))
    corners = torch.rand(num_boxes, 2, 2, generator=generator).sort(dim=1).values
    boxes = corners.flatten(1) * torch.tensor([width - 9, height - 9] * 2)
    taught.gt_boxes = Boxes(boxes + torch.tensor([0, 0, 8, 8]))
    taught.gt_classes = torch.randint(classes, (num_boxes,), generator=generator)
    taught.scores = 0.1 + 0.9 * torch.rand(num_boxes, generator=generator)
    return {**sample, "teacher_instances": taught}


def losses_in(folder: Path) -> list[dict]:
    """Iteration and losses of each line of metrics.json that has losses."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if key.startswith(("loss_", "iteration"))}
        for line in lines
        if "total_loss" in line
    ]
