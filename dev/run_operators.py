#!/usr/bin/env python
"""Run every compiled operator on small and unusual inputs, in all types, forward and backward.

    python dev/run_operators.py --device cuda [--smoke]
    compute-sanitizer --tool memcheck python dev/run_operators.py --device cuda

For compute-sanitizer, under which the test suite takes too long. Also compares each result with the
PyTorch reference implementation on the same device.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from dn_detr import ops
from dn_detr.losses.matcher import Costs, assign
from dn_detr.ops.extension import KERNELS
from dn_detr.structures import Predictions, Segment, Target, pad_targets

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = (((5, 7), (3, 2), (1, 1)), ((9, 4), (0, 3), (4, 4), (2, 2)))
# (batch, queries, heads, channels, points): usual widths, and those that no vector load fits.
SIZES = ((2, 5, 2, 32, 4), (1, 3, 1, 64, 2), (2, 33, 3, 16, 4), (1, 7, 2, 5, 3), (2, 1, 1, 8, 1),
         (1, 0, 2, 32, 4), (3, 9, 8, 32, 4))  # fmt: skip


def close(got, expected, name: str) -> None:
    tolerance = 1e-4 if expected.dtype == torch.float32 else 3e-2
    error = (got.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-6)
    if not error <= tolerance:
        sys.exit(f"{name}: relative error {error:.2g}")


def odd(x, parts: int):
    """Round x to odd multiples of 1 / (2 * parts).

    Samples then stay away from whole cells, where rounding errors change gradients.
    """
    return ((x * parts).floor() + 0.5) / parts


def sampling_inputs(device, dtype, shapes, size):
    batch, queries, heads, channels, points = size
    generator = torch.Generator().manual_seed(0)

    def rand(*sizes):
        return torch.rand(*sizes, generator=generator)

    tokens = sum(height * width for height, width in shapes)
    value = rand(batch, tokens, heads, channels) - 0.5
    locations = odd(rand(batch, queries, heads, len(shapes), points, 2) * 1.6 - 0.3, 64)
    weights = rand(batch, queries, heads, len(shapes), points)
    grad = rand(batch, queries, heads * channels) - 0.5
    leaves = [x.to(device).requires_grad_() for x in (value.to(dtype), locations, weights)]
    return leaves, grad.to(device, dtype)


def under(is_deterministic: bool, function, *arguments):
    """Call a kernel under torch.use_deterministic_algorithms.

    PyTorch's grid_sample has no deterministic backward on a GPU.
    """
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        return function(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)


def run_sampling(device: str, is_deterministic: bool) -> None:
    for dtype, shapes, size in itertools.product(DTYPES, LEVELS, SIZES):
        (value, locations, weights), grad = sampling_inputs(device, dtype, shapes, size)

        def run(function, value=value, shapes=shapes, others=(locations, weights), grad=grad):
            output = function(value, shapes, *others)
            return output, *torch.autograd.grad(output, (value, *others), grad)

        results = under(is_deterministic, run, ops.ms_deform_attn)
        for got, expected in zip(results, run(ops.ms_deform_attn_pytorch), strict=True):
            close(got, expected, f"ms_deform_attn {dtype} {shapes} {size}")


def run_deformable_attention(device: str, is_deterministic: bool) -> None:
    # Width of the reference, whether each level has its own, whether there is padding.
    kinds = list(itertools.product((2, 4), (False, True), (False, True)))
    for dtype, shapes, size in itertools.product(DTYPES, LEVELS, SIZES):
        for width, is_per_level, has_padding in kinds if size == SIZES[0] else [(2, False, True)]:
            (value, offsets, logits), grad = sampling_inputs(device, dtype, shapes, size)
            levels = (len(shapes),) if is_per_level else ()
            reference = torch.rand(*offsets.shape[:2], *levels, width, device=device)
            reference = odd(reference * 0.8 + 0.1, 32).requires_grad_()
            valid = torch.tensor([[w, h] for h, w in shapes], device=device).float()
            valid = valid.expand(value.shape[0], -1, -1)
            padding = torch.rand(value.shape[:2], device=device) < 0.2 if has_padding else None
            inputs = (value, shapes, valid, reference, offsets, logits.flatten(3), padding)

            def run(function, inputs=inputs, grad=grad):
                output = function(*inputs)
                leaves = (inputs[0], *inputs[3:6])
                return output, *torch.autograd.grad(output, leaves, grad)

            results = under(is_deterministic, run, ops.deformable_attention)
            for got, expected in zip(results, run(ops.deformable_attention_pytorch), strict=True):
                close(got, expected, f"deformable_attention {dtype} {shapes} {size} {width}")


def run_noise(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for counts, contrastive, dtype in itertools.product(
        ((3, 1, 0, 5), (40, 2), (1,)), (False, True), (torch.float32, torch.bfloat16)
    ):
        most = max(counts)
        is_object = torch.arange(most) < torch.tensor(counts)[:, None]
        inputs = (
            torch.randint(7, is_object.shape, generator=generator),
            torch.rand(*is_object.shape, 4, generator=generator),
            is_object,
            torch.arange(len(counts)),
        )
        for slots, hide_empty in ((most, True), (max(1, most // 2), True), (most, False)):
            numbers = (5, slots, 7, 0.4, 0.5, contrastive, 13, dtype, hide_empty)
            got = _noise(ops.noise_objects, [x.to(device) for x in inputs], numbers)
            expected = _noise(ops.noise_objects_pytorch, [x.to(device) for x in inputs], numbers)
            if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
                sys.exit(f"noise_objects: different result for {counts} {numbers}")


def run_matching(device: str) -> None:
    """Run `losses.assign` with and without operators; random costs have a unique optimum."""
    generator = torch.Generator().manual_seed(0)
    for counts, queries, num_groups, matches_per_object in (
        ((3, 1, 0, 5), 12, 1, 1), ((40, 2), 66, 3, 1), ((1,), 1, 1, 1), ((4, 7), 30, 2, 2)
    ):  # fmt: skip
        targets = pad_targets(
            [
                Target(
                    torch.randint(7, (count,), generator=generator),
                    torch.rand(count, 4, generator=generator) * 0.4 + 0.1,
                )
                for count in counts
            ]
        ).to(device)
        shape = (3, len(counts), queries)
        is_empty = torch.rand(shape[1:], generator=generator) < 0.1
        segment = Segment(
            "match",
            queries,
            num_groups=num_groups,
            matches_per_object=matches_per_object,
            is_empty=is_empty.to(device),
        )
        predictions = Predictions(
            logits=torch.randn(*shape, 7, generator=generator).to(device),
            boxes=(torch.rand(*shape, 4, generator=generator) * 0.4 + 0.1).to(device),
            references=(None,) * 3,
            segments=(segment,),
        )
        got = assign(predictions, targets, Costs())["match"].object_of
        with ops.pytorch_operators():
            expected = assign(predictions, targets, Costs())["match"].object_of
        if not torch.equal(got, expected):
            sys.exit(
                f"matching: wrong assignment: {counts} {queries} {num_groups} {matches_per_object}"
            )


def _noise(function, inputs, numbers):
    names = ("num_groups", "slots_per_group", "num_classes", "box_noise", "label_noise",
             "contrastive", "num_matched", "mask_dtype", "hide_empty")  # fmt: skip
    return function(*inputs, **dict(zip(names, numbers, strict=True)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="each operator at one size")
    options = parser.parse_args()
    device = options.device
    if options.smoke:
        global DTYPES, LEVELS, SIZES
        DTYPES, LEVELS, SIZES = DTYPES[:2], LEVELS[:1], SIZES[-1:]
    missing = [name for name, devices in KERNELS.items() if device not in devices]
    for is_deterministic in (False, True):
        run_sampling(device, is_deterministic)
        run_deformable_attention(device, is_deterministic)
    run_noise(device)
    run_matching(device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"all operators agree with PyTorch; without a kernel: {missing or 'none'}")


if __name__ == "__main__":
    main()
