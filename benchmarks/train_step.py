#!/usr/bin/env python
"""Measure time and memory of a training step.

    python benchmarks/train_step.py --device cuda --save
    python benchmarks/train_step.py --device cpu --size 256 320 --batch 1
    python benchmarks/train_step.py --config-file configs/dino.yaml --device cuda --batch 2 8

A step is forward, matching, losses, backward, clipping and optimizer, on images of noise in memory,
without data loading. Each configuration runs with and without denoising, interleaved, on CUDA also
with bfloat16 (`SOLVER.AMP.ENABLED`). "plain operators" replaces every operator of this project by
its PyTorch reference implementation. Memory is that of forward and backward, without model,
gradients, optimizer and images. Needs Detectron2.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from common import count_launches, make_parser, markdown, save, table, time_side_by_side
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from peak_memory import peak_mib

from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.solver.optimizer import build_optimizer
from dn_detr.ops import pytorch_operators

NUM_CLASSES, OBJECTS = 80, 7


@dataclass(frozen=True)
class Case:
    """A configuration, and how it is run."""

    config: str
    batch: int
    size: tuple[int, int]
    device: str
    precision: str = "float32"
    is_denoised: bool = True
    is_plain: bool = False
    opts: tuple[str, ...] = ()
    objects: int = OBJECTS
    name: str = ""

    @property
    def who(self) -> str:
        if self.name:
            return self.name
        if self.is_plain:
            return "plain operators"
        kind = "denoised" if self.is_denoised else "without denoising"
        return kind if self.precision == "float32" else f"{kind}, {self.precision}"


def row_of(case: Case) -> dict:
    return {**asdict(case), "size": "x".join(map(str, case.size)), "who": case.who}


def make_batch(case: Case) -> list[dict]:
    """Make images of noise, every second one a tenth narrower, with 7, 5, 7, 5, ... objects.

    Teachers' boxes equal the objects, and masks fill their boxes.
    """
    generator = torch.Generator().manual_seed(0)
    samples = []
    for image_id in range(case.batch):
        height, width = case.size[0], case.size[1] - image_id % 2 * case.size[1] // 10
        count = case.objects - image_id % 2 * 2
        corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values.flatten(1)
        instances = Instances((height, width))
        boxes = corners * torch.tensor([width - 9, height - 9] * 2) + torch.tensor([0, 0, 8, 8])
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(NUM_CLASSES, (count,), generator=generator)
        taught = Instances((height, width), **instances.get_fields(), scores=torch.ones(count))
        instances.gt_masks = filled(instances.gt_boxes, height, width)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        samples.append(
            {
                "image": image.to(case.device),
                "image_id": image_id,
                "instances": instances,
                "teacher_instances": taught,
            }
        )
    return samples


def filled(boxes: Boxes, height: int, width: int) -> BitMasks:
    x0, y0, x1, y1 = boxes.tensor[..., None, None].unbind(1)
    x, y = torch.arange(width), torch.arange(height)[:, None]
    return BitMasks((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1))


def make_model(case: Case):
    """Make a model in training mode, with weights drawn from seed 0, and its optimizer."""
    cfg = read_config(case.config, list(case.opts))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.SEED = case.device, "", 0
    cfg.MODEL.DN_DETR.NUM_CLASSES = NUM_CLASSES
    if not case.is_denoised:
        cfg.MODEL.DN_DETR.DENOISING.ENABLED = False
    torch.manual_seed(0)
    model = build_model(cfg).train()
    return model, build_optimizer(cfg, model)


def make_step(case: Case):
    """Return a function that runs one training step."""
    model, optimizer = make_model(case)
    batch = make_batch(case)
    has_amp = case.precision != "float32"

    def step():
        with EventStorage(), torch.autocast(case.device, torch.bfloat16, enabled=has_amp):
            losses = model(batch)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return total

    def plain_step():
        with pytorch_operators():
            return step()

    return plain_step if case.is_plain else step


def make_settled_step(case: Case):
    """Run `make_step` once, so that gradients and optimizer states are allocated."""
    step = make_step(case)
    step()
    return step


def measure(cases: list[Case], seconds: float, with_memory: bool) -> list[dict]:
    device = cases[0].device
    steps, rows = {}, []
    for case in cases:
        step = make_step(case)
        try:
            loss = step()
        except torch.OutOfMemoryError:
            rows.append({**row_of(case), "measure": "ms", "note": "out of memory"})
            continue
        if not torch.isfinite(loss):
            raise AssertionError(f"the loss is not finite: {case}")
        steps[case] = step
    timings = time_side_by_side(
        {case.who: lambda f=step: f for case, step in steps.items()}, device, seconds
    )
    for case, step in steps.items():
        row = {**row_of(case), "measure": "ms", **asdict(timings[case.who])}
        row["images_per_s"] = case.batch * 1000 / row["ms"]
        if device == "cuda":
            row |= count_launches(step)
        rows.append(row)
    if with_memory:
        fitting = list(steps)
        steps.clear()
        for case in fitting:
            mib = peak_mib(device, make_settled_step, None, (case,))
            if mib is not None:
                rows.append({**row_of(case), "measure": "peak MiB", "mib": mib})
    return rows


def variants(config: str, batch: int, args) -> list[Case]:
    case = partial(Case, config, batch, tuple(args.size), args.device)
    precisions = ("float32",) if args.device == "cpu" else ("float32", "bfloat16")
    found = [case(p, is_denoised=d) for p in precisions for d in (True, False)]
    return found + [case(is_plain=True)] * args.is_plain


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--config-file", type=Path, nargs="+",
                        default=[Path("configs/dn_deformable.yaml")])  # fmt: skip
    parser.add_argument("--batch", type=int, nargs="+", default=[2])
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), help="height and width")
    parser.add_argument("--plain-operators", action="store_true", dest="is_plain",
                        help="also measure PyTorch implementations")  # fmt: skip
    parser.add_argument("--no-memory", action="store_true")
    args = parser.parse_args()
    seconds = args.seconds if args.seconds is not None else (0.0 if args.quick else 5.0)
    rows = []
    for config in args.config_file:
        for batch in args.batch:
            rows += measure(variants(str(config), batch, args), seconds, not args.no_memory)
    keys = ("config", "batch", "size", "measure")
    print(table(rows, keys, against="denoised"))
    if args.device == "cuda":
        columns = ("who", "config", "batch", "kernels", "copies", "waits")
        timed = [row for row in rows if "kernels" in row]
        print(markdown(columns, [[str(row[c]) for c in columns] for row in timed]))
    save(args, "train_step", rows, keys=keys, against="denoised")


if __name__ == "__main__":
    main()
