#!/usr/bin/env python
"""Measure the time of the bipartite matching of a step.

    python benchmarks/matcher.py --device cpu
    python benchmarks/matcher.py --device cuda --save

"dn_detr": `losses.matcher.assign`, all layers and images at once; "plain": the same with PyTorch
and SciPy instead of compiled operators; "published style": for each layer a dense cost matrix
between all queries and all objects of the batch, including those of other images, then a call of
SciPy for each image, as in most published code, written for this benchmark. Assignments must have
the same total cost before anything is timed. On CUDA also the number of kernel launches and of
synchronizations.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from common import count_launches, make_parser, markdown, save, table, time_side_by_side
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dn_detr.layers.box_ops import cxcywh_to_xyxy, elementwise_generalized_iou
from dn_detr.losses.matcher import Costs, assign
from dn_detr.ops import pytorch_operators
from dn_detr.structures import Predictions, Segment, Target, Targets, pad_targets

CLASSES = 80


@dataclass(frozen=True)
class Case:
    """Sizes of a matching problem."""

    layers: int
    batch: int
    queries: int
    objects: int


CASES = [
    Case(6, 2, 300, 7),
    Case(6, 2, 300, 20),
    Case(6, 2, 900, 20),
    Case(6, 16, 300, 7),
    Case(6, 16, 900, 20),
]


def make_inputs(case: Case, device: str) -> tuple[Predictions, Targets]:
    """Make predictions near the objects, as in training, and noise for the other queries."""
    generator = torch.Generator().manual_seed(0)

    def boxes(*shape):
        size = torch.rand(*shape, 2, generator=generator) * 0.4 + 0.05
        return torch.cat((torch.rand(*shape, 2, generator=generator) * 0.8 + 0.1, size), dim=-1)

    targets = pad_targets(
        [
            Target(
                torch.randint(CLASSES, (case.objects,), generator=generator), boxes(case.objects)
            )
            for _ in range(case.batch)
        ]
    )
    shape = (case.layers, case.batch, case.queries)
    guesses = boxes(*shape)
    near = targets.boxes + torch.randn(case.layers, *targets.boxes.shape, generator=generator) / 20
    guesses[:, :, : case.objects] = near.clamp(0.02, 0.98)
    logits = torch.randn(*shape, CLASSES, generator=generator) - 4
    predictions = Predictions(
        logits=logits.to(device),
        boxes=guesses.to(device),
        references=(None,) * case.layers,
        segments=(Segment("match", case.queries),),
    )
    return predictions, targets.to(device)


def dense_cost(logits: Tensor, boxes: Tensor, labels: Tensor, object_boxes: Tensor) -> Tensor:
    """[Q, T] of one layer: class cost of the focal loss 2, L1 5, GIoU 2."""
    probability = logits.sigmoid()
    no = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
    yes = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
    distance = torch.cdist(boxes, object_boxes, p=1)
    overlap = elementwise_generalized_iou(
        cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(object_boxes)[None]
    )
    return 2 * (yes[:, labels] - no[:, labels]) + 5 * distance - 2 * overlap


@torch.no_grad()
def published_style(predictions: Predictions, targets: list[tuple[Tensor, Tensor]]) -> list:
    """(queries, objects) of each image of each layer; targets: labels and boxes of each image."""
    labels = torch.cat([one for one, _ in targets])
    object_boxes = torch.cat([one for _, one in targets])
    counts = [one.shape[0] for one, _ in targets]
    found = []
    for logits, boxes in zip(predictions.logits, predictions.boxes, strict=True):
        batch, queries = boxes.shape[:2]
        cost = dense_cost(logits.flatten(0, 1), boxes.flatten(0, 1), labels, object_boxes)
        parts = cost.view(batch, queries, -1).cpu().split(counts, dim=-1)
        pairs = [linear_sum_assignment(part[image]) for image, part in enumerate(parts)]
        found.append([(torch.as_tensor(rows), torch.as_tensor(columns)) for rows, columns in pairs])
    return found


def check(predictions: Predictions, targets: Targets, lists: list, case: Case) -> None:
    """Check that total costs are equal for every layer and image."""
    object_of = assign(predictions, targets, Costs())["match"].object_of.cpu()
    for layer, images in enumerate(published_style(predictions, lists)):
        for image, (rows, columns) in enumerate(images):
            cost = dense_cost(
                predictions.logits[layer, image], predictions.boxes[layer, image], *lists[image]
            ).cpu()
            mine = (object_of[layer, image] >= 0).nonzero()[:, 0]
            total = cost[mine, object_of[layer, image, mine]].sum()
            if mine.shape[0] != case.objects:
                raise AssertionError(f"{mine.shape[0]} of {case.objects} objects are matched")
            torch.testing.assert_close(total, cost[rows, columns].sum(), rtol=1e-4, atol=1e-4)


def assign_plainly(predictions: Predictions, targets: Targets):
    with pytorch_operators():
        return assign(predictions, targets, Costs())


def measure(case: Case, device: str, seconds: float) -> list[dict]:
    predictions, targets = make_inputs(case, device)
    lists = [
        (targets.labels[image, :count], targets.boxes[image, :count])
        for image, count in enumerate(targets.counts)
    ]
    check(predictions, targets, lists, case)
    candidates = {
        "dn_detr": lambda: assign(predictions, targets, Costs()),
        "plain": lambda: assign_plainly(predictions, targets),
        "published style": lambda: published_style(predictions, lists),
    }
    timings = time_side_by_side(
        {name: lambda f=function: f for name, function in candidates.items()}, device, seconds
    )
    rows = []
    for name, timing in timings.items():
        row = {**asdict(case), "who": name, **asdict(timing)}
        if device == "cuda":
            row |= count_launches(candidates[name])
        rows.append(row)
    return rows


def main():
    args = make_parser(__doc__).parse_args()
    seconds = args.seconds if args.seconds is not None else (0.0 if args.quick else 2.0)
    cases = [Case(2, 2, 30, 5)] if args.quick else CASES
    rows = [row for case in cases for row in measure(case, args.device, seconds)]
    keys = ("layers", "batch", "queries", "objects")
    print(table(rows, keys, against="dn_detr"))
    print("\nmilliseconds, and times longer than dn_detr")
    if args.device == "cuda":
        columns = ("who", *keys, "kernels", "copies", "waits")
        print(markdown(columns, [[str(row[c]) for c in columns] for row in rows]))
    save(args, "matcher", rows, keys=keys, against="dn_detr")


if __name__ == "__main__":
    main()
