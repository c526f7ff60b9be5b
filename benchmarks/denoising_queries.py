#!/usr/bin/env python
"""Measure the time to build the denoising queries of a step.

    python benchmarks/denoising_queries.py --device cpu
    python benchmarks/denoising_queries.py --device cuda --save

Noised labels and boxes, their assignment, the empty queries, and the attention mask. "dn_detr":
`ops.noise_objects`, one launch; "plain": its PyTorch reference implementation; "published style":
the same steps in PyTorch operators as in the published code (per image and group, positions of
flipped labels by `nonzero`, sizes read from the device), written for this benchmark. On CUDA also
the number of kernel launches and of synchronizations.

Every call gets the next of several batches, as in training, with other numbers of objects and up to
two objects fewer than the case in its fullest image, so that sizes change from call to call.

"with padding of targets" includes `pad_targets`, which dn_detr runs once a step on the host, also
for the matcher and the losses. The published style returns a bool mask, which attention converts to
numbers in every layer; "published style, mask as numbers" converts it once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from common import (
    copy_bandwidth,
    count_launches,
    make_parser,
    markdown,
    save,
    table,
    time_side_by_side,
)
from torch import Tensor

from dn_detr.auxiliary.denoising import FixedGroups, ObjectBudget
from dn_detr.ops import noise_objects, noise_objects_pytorch
from dn_detr.structures import Target, Targets, pad_targets

NUM_CLASSES = 80
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """A case; `objects` is the number of objects of the fullest image."""

    kind: str
    batch: int
    objects: int
    queries: int
    step: int = 0

    @property
    def is_contrastive(self) -> bool:
        return self.kind == "contrastive"

    @property
    def groups(self) -> tuple[int, int]:
        rule = ObjectBudget() if self.is_contrastive else FixedGroups()
        return rule(self.objects)


CASES = [
    Case("plain", 2, 7, 300),
    Case("plain", 2, 40, 300),
    Case("plain", 16, 7, 300),
    Case("contrastive", 2, 7, 900),
    Case("contrastive", 2, 40, 900),
    Case("contrastive", 16, 7, 900),
]


STEPS = 12


def steps_of(case: Case) -> list[Case]:
    """Make consecutive batches of a training; the first is the case itself."""
    return [replace(case, step=i, objects=case.objects - i % 3) for i in range(STEPS)]


def make_targets(case: Case) -> list[Target]:
    generator = torch.Generator().manual_seed(case.step)
    counts = torch.randint(1, case.objects + 1, (case.batch,), generator=generator)
    counts[case.step % case.batch] = case.objects
    targets = []
    for image, count in enumerate(counts.tolist()):
        size = torch.rand(count, 2, generator=generator) * 0.5 + 0.05
        centre = size / 2 + torch.rand(count, 2, generator=generator) * (1 - size)
        labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
        targets.append(
            Target(labels, torch.cat((centre, size), dim=1), noise_seed=image + 100 * case.step)
        )
    return targets


def build(function, targets: Targets, case: Case, dtype: torch.dtype, groups=None):
    """Build the queries; groups: `case.groups`, if computed before."""
    num_groups, slots = groups or case.groups
    return function(
        targets.labels,
        targets.boxes,
        targets.is_object,
        targets.noise_seeds,
        num_groups=num_groups,
        slots_per_group=slots,
        num_classes=NUM_CLASSES,
        box_noise=1.0 if case.is_contrastive else 0.4,
        label_noise=0.2,
        contrastive=case.is_contrastive,
        num_matched=case.queries,
        mask_dtype=dtype,
        hide_empty=True,
    )


def published_style(labels: list[Tensor], boxes: list[Tensor], case: Case) -> tuple[Tensor, ...]:
    """Noise lists over images as published code does.

    Returns:
        labels [B, T], boxes [B, T, 4], (image, query) of noised objects, mask [T + N, T + N] bool,
        True = blocked.
    """
    device = labels[0].device
    kinds = 2 if case.is_contrastive else 1
    counts = [sum(torch.ones_like(one)) for one in labels]  # numbers on the device
    most = int(max(counts))
    num_groups = max(1, 100 // most) if case.is_contrastive else 5
    copies = num_groups * kinds
    image_of = torch.cat([torch.full_like(one, i) for i, one in enumerate(labels)])
    image_of = image_of.repeat(copies)
    noised_labels = torch.cat(labels).repeat(copies)
    noised_boxes = torch.cat(boxes).repeat(copies, 1)
    total = torch.cat(labels).shape[0]

    draw = torch.rand_like(noised_labels.float())
    flipped = torch.nonzero(draw < 0.2).view(-1)  # waits for its size
    noised_labels.scatter_(0, flipped, torch.randint_like(flipped, 0, NUM_CLASSES))
    if case.is_contrastive:
        is_negative = torch.zeros(num_groups, 2, total, dtype=torch.bool, device=device)
        is_negative[:, 1] = True
        half = noised_boxes[:, 2:] / 2
        sides = torch.cat((noised_boxes[:, :2] - half, noised_boxes[:, :2] + half), dim=1)
        sign = torch.randint_like(sides, 0, 2) * 2 - 1
        reach = torch.rand_like(sides)
        reach[is_negative.view(-1)] += 1
        sides = (sides + sign * reach * half.repeat(1, 2)).clamp(0, 1)
        noised_boxes = torch.cat(
            ((sides[:, :2] + sides[:, 2:]) / 2, sides[:, 2:] - sides[:, :2]), dim=1
        )
    else:
        reach = torch.cat((noised_boxes[:, 2:] / 2, noised_boxes[:, 2:]), dim=1)
        move = torch.rand_like(noised_boxes) * 2 - 1
        noised_boxes = (noised_boxes + move * reach * 0.4).clamp(0, 1)

    slots = most * copies
    all_labels = torch.zeros(len(labels), slots, dtype=torch.int64, device=device)
    all_boxes = torch.zeros(len(labels), slots, 4, device=device)
    slot_of = torch.cat([torch.arange(int(count), device=device) for count in counts])
    slot_of = torch.cat([slot_of + most * copy for copy in range(copies)]).long()
    all_labels[image_of, slot_of] = noised_labels
    all_boxes[image_of, slot_of] = noised_boxes

    size = most * kinds
    mask = torch.zeros(slots + case.queries, slots + case.queries, device=device) > 0
    mask[slots:, :slots] = True
    for group in range(num_groups):
        first, end = group * size, (group + 1) * size
        mask[first:end, end:slots] = True
        mask[first:end, :first] = True
    return all_labels, all_boxes, image_of, slot_of, mask


def check(case: Case, device: str) -> None:
    """Check that the kernel equals the reference bit for bit, and the published style too.

    The latter's mask is that of the kernel if no query is empty.
    """
    targets = make_targets(case)
    padded = pad_targets(targets).to(device)
    got = build(noise_objects, padded, case, torch.float32)
    for mine, plain in zip(
        got, build(noise_objects_pytorch, padded, case, torch.float32), strict=True
    ):
        if not torch.equal(mine, plain):
            raise AssertionError("the kernel and its reference implementation differ")
    labels, boxes = ([getattr(t, n).to(device) for t in targets] for n in ("labels", "boxes"))
    all_labels, _, image_of, slot_of, mask = published_style(labels, boxes, case)
    is_empty = torch.ones_like(all_labels, dtype=torch.bool)
    is_empty[image_of, slot_of] = False
    visible = got.mask[case.step % case.batch, 0] == 0  # of the fullest image
    if not (torch.equal(is_empty, got.is_empty) and torch.equal(visible, ~mask)):
        raise AssertionError("the published style builds different queries or a different mask")


def bytes_of(case: Case, dtype: str) -> int:
    """Return the bytes that a call must read and write, most of them for the mask."""
    num_groups, slots = case.groups
    total = num_groups * slots * (2 if case.is_contrastive else 1)
    side = total + case.queries
    mask = case.batch * side * (-(-side // 16) * 16) * (4 if dtype == "float32" else 2)
    return mask + case.batch * (total * 33 + case.objects * 25 + 8)


def as_numbers(mask: Tensor) -> Tensor:
    """Convert a bool mask as attention does."""
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(mask, -torch.inf)


def in_turn(calls: list[Callable]) -> Callable:
    """Return a function that cycles through `calls`."""
    endless = itertools.cycle(calls)
    return lambda: next(endless)()


def candidates_of(case: Case, device: str) -> dict[str, Callable]:
    """Return a call for this batch per candidate."""
    targets = make_targets(case)
    padded = pad_targets(targets).to(device)
    labels, boxes = ([getattr(t, n).to(device) for t in targets] for n in ("labels", "boxes"))
    groups = case.groups

    def published_with_numbers():
        *slots, mask = published_style(labels, boxes, case)
        return *slots, as_numbers(mask)

    return {
        "dn_detr": lambda: build(noise_objects, padded, case, torch.float32, groups),
        "dn_detr, bfloat16 mask": lambda: build(
            noise_objects, padded, case, torch.bfloat16, groups
        ),
        "dn_detr, with padding of targets": lambda: build(
            noise_objects, pad_targets(targets).to(device), case, torch.float32
        ),
        "plain": lambda: build(noise_objects_pytorch, padded, case, torch.float32),
        "published style": lambda: published_style(labels, boxes, case),
        "published style, mask as numbers": published_with_numbers,
    }


def measure(case: Case, device: str, seconds: float, peak: float) -> list[dict]:
    steps = steps_of(case)
    for step in steps:
        check(step, device)
    of_steps = [candidates_of(step, device) for step in steps]
    candidates = {name: in_turn([one[name] for one in of_steps]) for name in of_steps[0]}
    timings = time_side_by_side(
        {name: lambda f=function: f for name, function in candidates.items()}, device, seconds
    )
    rows = []
    for name, timing in timings.items():
        row = {**asdict(case), "groups": case.groups[0], "who": name, **asdict(timing)}
        del row["step"]
        if device == "cuda" and name.startswith("dn_detr"):  # a CPU does not write whole masks
            total = bytes_of(case, "bfloat16" if "bfloat16" in name else "float32")
            row["gb_per_s"] = total / (timing.ms * 1e6)
            row["share_of_copy"] = row["gb_per_s"] / peak
        if device == "cuda":
            row |= count_launches(candidates[name])
        rows.append(row)
    return rows


def main():
    parser = make_parser(__doc__)
    args = parser.parse_args()
    peak = copy_bandwidth(args.device, 1 if args.quick else 256)
    seconds = args.seconds if args.seconds is not None else (0.0 if args.quick else 2.0)
    cases = CASES[::3] if args.quick else CASES
    rows = [row for case in cases for row in measure(case, args.device, seconds, peak)]
    keys = ("kind", "batch", "objects", "groups", "queries")
    print(table(rows, keys, against="dn_detr"))
    print("\nmilliseconds, and times longer than dn_detr")
    if args.device == "cuda":
        print(f"a copy moves {peak:.0f} GB/s, dn_detr:")
        for row in (row for row in rows if row["who"] == "dn_detr"):
            case = ", ".join(str(row[key]) for key in keys)
            print(f"  {case}: {row['gb_per_s']:.1f} GB/s, {row['share_of_copy']:.0%} of a copy")
        columns = ("who", *keys, "kernels", "copies", "waits")
        print(markdown(columns, [[str(row[c]) for c in columns] for row in rows]))
    save(args, "denoising_queries", rows, copy_gb_per_s=peak, keys=keys, against="dn_detr")


if __name__ == "__main__":
    main()
