#!/usr/bin/env python
"""Count the operators that a training step launches, by part of the model.

    python benchmarks/launches.py
    python benchmarks/launches.py --config-file configs/dino.yaml --size 320 416

Operators are those that PyTorch dispatches, from the batch on the host to the step of the
optimizer: neither views nor empty tensors. On a GPU each is a kernel or a few; the operators of
this project and a foreach operator that joins many tensors count as one. The counts are the same on
every device. A backward operator belongs to the part of its forward. Needs Detectron2.
"""

from __future__ import annotations

import argparse
import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from common import markdown
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode
from train_step import Case, make_batch, make_model

from dn_detr.d2.engine.train_step import TrainStep

PARTS = {
    "backbone": "backbone",
    "core": "between parts",
    "core.neck": "neck",
    "core.flatten": "tokens",
    "core.encoder": "encoder",
    "core.query_design": "queries",
    "core.auxiliary.0": "queries",
    "core.decoder": "decoder",
    "core.decoder.position": "query position",
    "core.decoder.predictor": "heads",
}
"""Modules of `DenoisingDETR` and the names of their parts."""
NOT_LAUNCHED = re.compile(
    r"profiler\.|aten\.(_unsafe_view|(new_)?empty\w*|lift_fresh|detach|promote_types|scalar_tensor)\b"
)
"""Views that do not say so, memory, and what stays on the host."""


def launches(name: str, args: tuple) -> int:
    """1, or for foreach operators that cannot join their tensors the number of tensors."""
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and "_foreach_" in name]
    lists = [some for some in lists if some and isinstance(some[0], torch.Tensor)]
    shapes = {tuple(tuple(tensor.shape) for tensor in tensors) for tensors in lists}
    return 1 if len(shapes) < 2 else len(lists[0])


class OperatorCounter(TorchDispatchMode):
    """Counts operators as (part, name), where `part` is what now runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.part = "step"
        self.starts, self.parts = [0], [self.part]  # of autograd nodes, by sequence number

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        before = self.part
        self.enter(part)
        yield
        self.enter(before)

    def enter(self, part: str) -> None:
        self.part = part
        self.starts.append(torch.autograd._get_sequence_nr())
        self.parts.append(part)

    def watch(self, owner: object, method: str, part: str) -> None:
        """Count what `owner.method(...)` does as `part`."""
        function = getattr(owner, method)

        def watched(*args, **kwargs):
            with self.within(part):
                return function(*args, **kwargs)

        setattr(owner, method, watched)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        if not (func.is_view or NOT_LAUNCHED.match(str(func))):
            node, part = torch._C._current_autograd_node(), self.part
            if node is not None:
                number = node._sequence_nr()
                is_leaf = number > torch.autograd._get_sequence_nr()  # adds a gradient up
                part = self.part if is_leaf else self.parts[bisect(self.starts, number) - 1]
                part = f"{part}, backward"
            self.counts[part, str(func)] += launches(str(func), args)
        return func(*args, **(kwargs or {}))


def count_operators(case: Case) -> Counter[tuple[str, str]]:
    """Count the operators of the third step of a training by (part, name)."""
    model, optimizer = make_model(case)
    precision = None if case.precision == "float32" else case.precision
    step = TrainStep(model, [make_batch(case)] * 3, optimizer, precision=precision, seed=0)
    with EventStorage():
        for step.iter in range(2):
            step.run_step()
        step.iter, counter = 2, OperatorCounter()
        for name, part in PARTS.items():
            counter.watch(model.get_submodule(name), "forward", part)
        counter.watch(model, "make_batch", "batch")
        counter.watch(model, "losses", "matching")
        counter.watch(model, "criterion", "losses")
        counter.watch(step, "report", "report")
        counter.watch(step.grad_scaler, "step", "optimizer")
        with counter:
            step.run_step()
    return counter.counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", type=Path, default=Path("configs/dn_deformable.yaml"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320), help="height and width")
    parser.add_argument("--part", help="list the operators of this part, such as 'heads, backward'")
    args = parser.parse_args()
    found = {}
    for precision in ("float32", "bfloat16"):
        case = Case(str(args.config_file), args.batch, tuple(args.size), "cpu", precision)
        found[precision] = count_operators(case)
    column = 0
    if args.part:
        column = 1
        for precision, counts in found.items():
            kept = {key: n for key, n in counts.most_common() if key[0] == args.part}
            found[precision] = Counter(kept)
    rows = list(dict.fromkeys(key[column] for counts in found.values() for key in counts))
    body = [
        [row, *(str(sum(n for key, n in c.items() if key[column] == row)) for c in found.values())]
        for row in rows
    ]
    body.append(["all", *(str(counts.total()) for counts in found.values())])
    print(markdown((("part", "operator")[column], *found), body))


if __name__ == "__main__":
    main()
