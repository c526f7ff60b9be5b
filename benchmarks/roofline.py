#!/usr/bin/env python
"""Compute lower bounds for the time of the CUDA kernels of deformable attention, without a GPU.

    python benchmarks/roofline.py

For the whole module of deformable attention on an image of 800x1066: the minimum time of memory,
caches, atomics and instruction issue, each as if the others were free. The longest is the lower
bound of the kernel. The rates below are those of an H200; two of them are assumed. Instruction
counts are those of `dev/sass_report.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from attention_inputs import CHANNELS, HEADS, POINTS, Case, bytes_and_operations
from common import markdown, three_digits

MEMORY, L1 = 4.3e12, 30.9e12
"""Bytes a second: a copy, as published for an H200; 128 a clock, 132 multiprocessors, 1.83 GHz."""
L2, ATOMICS = 5.5e12, 5.5e12
"""Assumed: to be measured first on a GPU."""
ISSUE = 132 * 4 * 1.83e9
"""Instructions of a warp a second."""

INSTRUCTIONS = {
    ("forward", "float32"): 19.0,
    ("forward", "bfloat16"): 17.7,
    ("backward", "float32"): 44.7,
    ("backward", "bfloat16"): 37.3,
}
"""Of dn_detr for each sample, the upper figures of kernel_report.md."""
DEFORMOPS = {
    ("forward", "float32"): 33.4,
    ("forward", "bfloat16"): 25.6,
    ("backward", "float32"): 69.0,
    ("backward", "bfloat16"): 75.0,
}
"""Of deformops 3.0.1, Triton kernels for sm_90 with sums in float32, without its softmax and
location arithmetic, which are separate kernels."""


@dataclass(frozen=True)
class Floor:
    """Minimum milliseconds. l2: without L1 hits; atomics: gradients of values, backward only."""

    memory: float
    l1: float
    l2: float
    atomics: float
    issue: float
    issue_of_deformops: float

    @property
    def bound(self) -> tuple[float, str]:
        """Return the largest lower bound and its name."""
        parts = {name: getattr(self, name) for name in ("memory", "l1", "atomics", "issue")}
        name = max(parts, key=parts.get)
        return parts[name], name


def floor_of(case: Case, direction: str) -> Floor:
    """Compute the bounds of the whole module, one direction."""
    size = 4 if case.dtype == "float32" else 2
    tokens = sum(h * w for h, w in case.shapes)
    queries = case.queries or tokens
    samples = case.batch * queries * HEADS * len(case.shapes) * POINTS
    rows = case.batch * HEADS * CHANNELS * size
    forward = rows * (tokens + queries) + 3 * size * samples
    whole, _ = bytes_and_operations(case, "module")
    corners = samples * 4 * CHANNELS
    per_sample = INSTRUCTIONS[direction, case.dtype], DEFORMOPS[direction, case.dtype]
    return Floor(
        memory=1e3 * (forward if direction == "forward" else whole - forward) / MEMORY,
        l1=1e3 * corners * size / L1,
        l2=1e3 * corners * size / L2,
        atomics=1e3 * corners * 4 / ATOMICS if direction == "backward" else 0.0,
        issue=1e3 * samples * per_sample[0] / ISSUE,
        issue_of_deformops=1e3 * samples * per_sample[1] / ISSUE,
    )


def main():
    head = ("case", "batch", "dtype", "direction", "memory", "L1", "L2", "atomics", "issue",
            "issue of deformops", "floor", "bound")  # fmt: skip
    body = []
    for queries, batch in ((0, 2), (0, 16), (300, 2), (500, 2), (1100, 2), (300, 16), (1100, 16)):
        for dtype in ("float32", "bfloat16"):
            for direction in ("forward", "backward"):
                case = Case(queries, batch, dtype, "realistic")
                floor = floor_of(case, direction)
                longest, name = floor.bound
                times = [three_digits(time) for time in vars(floor).values()]
                body.append([case.row()["case"], str(batch), dtype, direction, *times,
                             three_digits(longest), name])  # fmt: skip
    print(markdown(head, body))
    print("\nmilliseconds, counted, not measured")


if __name__ == "__main__":
    main()
