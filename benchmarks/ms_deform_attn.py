#!/usr/bin/env python
"""Measure time and memory of deformable attention.

    python benchmarks/ms_deform_attn.py --device cpu
    python benchmarks/ms_deform_attn.py --device cuda --original ../Deformable-DETR --save

Measures, side by side, `ms_deform_attn` ("dn_detr"), its PyTorch reference implementation
("plain"), and every peer that is installed or given: forward and backward of the sampling alone,
then the whole module from raw offsets and logits (location arithmetic, softmax, sampling; here
"dn_detr" is `deformable_attention`), both directions together and, on CUDA, each of them. On an
image of 800x1066: 4 levels, 8 heads of 32 channels, 4 points; the encoder, where every cell is a
query, and decoders of 300, 500 and 1100 queries. Results are first compared with the reference
implementation; wrong ones are not timed, except those known to sum in bfloat16, whose largest error
is printed. On CUDA the L2 cache is emptied before each run. Figures are saved case by case.

"realistic" locations: a grid of references (boxes in decoders) and the offsets that training starts
from, with normal noise of 2 cells; "uniform": anywhere, as in the tests of most libraries.
The memory figures are what forward and backward of the whole module need beyond its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from attention_inputs import (
    Case,
    Inputs,
    bytes_and_operations,
    in_float32,
    locate,
    make_inputs,
    normalize,
)
from attention_peers import (
    DEFORMOPS_FLOAT32,
    FLOAT32_SUMS,
    LOSSY,
    Attend,
    deformops_with_softmax,
    find_peers,
)
from common import copy_bandwidth, make_parser, relative_error, save, table, time_side_by_side
from peak_memory import peak_mib
from torch import Tensor

from dn_detr.ops import (
    deformable_attention,
    deformable_attention_pytorch,
    ms_deform_attn,
    ms_deform_attn_pytorch,
)

TOLERANCES = {"float32": (1e-4, 2e-2), "bfloat16": (2e-2, 5e-2)}
"""Relative errors of results, and of the gradient by locations, which jumps between cells."""


def as_module(attend: Attend) -> Callable:
    """Return the whole module with a sampling function, as in common libraries."""

    def module(value, shapes, valid_sizes, reference, offsets, logits, padding):
        value = value.masked_fill(padding[..., None, None], 0.0)
        locations = locate(shapes, valid_sizes, reference, offsets)
        return attend(value, shapes, locations, normalize(logits, len(shapes)))

    return module


def deformops_module(
    value, shapes, valid_sizes, reference, offsets, logits, padding, **options
):  # fmt: skip
    locations = locate(shapes, valid_sizes, reference, offsets)
    value = value.masked_fill(padding[..., None, None], 0.0)
    return deformops_with_softmax(value, shapes, locations, logits, **options)


DEFORMOPS = {
    "deformops": deformops_module,
    DEFORMOPS_FLOAT32: partial(deformops_module, **FLOAT32_SUMS),
}


def deterministic(function: Callable) -> Callable:
    """`function` under torch.use_deterministic_algorithms; its backward too, if called inside."""

    def run(*args):
        torch.use_deterministic_algorithms(True)
        try:
            return function(*args)
        finally:
            torch.use_deterministic_algorithms(False)

    return run


# --------------------------------------------------------------------------------------- measures


def from_cold_cache(prepare: Callable) -> Callable:
    """`prepare`, followed by a write larger than the L2 cache of any GPU."""

    def run():
        prepared = prepare()
        torch.empty(2**26, device="cuda").zero_()  # 256 MiB
        return prepared

    return run


def sample(attend: Attend, x: Inputs) -> tuple[Tensor, ...]:
    """(output, and gradients by value, locations and weights) of the sampling alone."""
    output = attend(x.value, x.shapes, x.locations, x.weights)
    return output, *torch.autograd.grad(output, (x.value, x.locations, x.weights), x.grad)


def whole(module: Callable, x: Inputs) -> tuple[Tensor, ...]:
    """(output, and gradients by value, offsets and logits) of the whole module."""
    output = module(*arguments_of(x))
    return output, *torch.autograd.grad(output, (x.value, x.offsets, x.logits), x.grad)


def arguments_of(x: Inputs) -> tuple:
    """Of a module, in their order."""
    return x.value, x.shapes, x.valid_sizes, x.reference, x.offsets, x.logits, x.padding


def prepare_forward(attend: Attend, x: Inputs):
    return lambda: attend(x.value, x.shapes, x.locations, x.weights)


def prepare_backward(attend: Attend, x: Inputs):
    output = attend(x.value, x.shapes, x.locations, x.weights)
    inputs = (x.value, x.locations, x.weights)
    return lambda: torch.autograd.grad(output, inputs, x.grad)


def prepare_module_forward(module: Callable, x: Inputs):
    return lambda: module(*arguments_of(x))


def prepare_module_backward(module: Callable, x: Inputs):
    output = module(*arguments_of(x))
    return lambda: torch.autograd.grad(output, (x.value, x.offsets, x.logits), x.grad)


def errors_of(case: Case, candidates: dict, run: Callable, expected: list, names: tuple) -> dict:
    """Return (largest error over its tolerance, note or None) of each name, against "plain"."""
    tolerances = TOLERANCES[case.dtype]
    found = {}
    for name, function in candidates.items():
        try:
            results = (deterministic(run) if "deterministic" in name else run)(function)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            found[name] = (None, f"fails: {str(error).splitlines()[0][:60]}")
            continue
        errors = {
            what: relative_error(got, want)
            for what, got, want in zip(names, results, expected, strict=True)
        }
        excess = {w: e / tolerances[w in ("locations", "offsets")] for w, e in errors.items()}
        worst = max(excess, key=excess.get)
        is_right = excess[worst] <= 1 or (name in LOSSY and errors[worst] < 1)
        note = None if is_right else f"wrong: {worst} off by {errors[worst]:.1g}"
        found[name] = ({"error": errors[worst], "error_of": worst}, note)
    return found


def measure(case: Case, device: str, peers: dict[str, Attend], seconds: float, peak: float) -> list:
    x = make_inputs(case, device)
    sampling = {"dn_detr": ms_deform_attn, "plain": ms_deform_attn_pytorch, **peers}
    modules = {"dn_detr": deformable_attention, "dn_detr, unfused": as_module(ms_deform_attn)}
    modules["plain"] = deformable_attention_pytorch
    modules.update({name: as_module(attend) for name, attend in peers.items()})
    modules.update({name: DEFORMOPS[name] for name in DEFORMOPS if name in peers})
    if device == "cuda":
        sampling["dn_detr, deterministic"] = ms_deform_attn
        modules["dn_detr, deterministic"] = deformable_attention
    rows: list[dict] = []

    def add(measured: str, candidates: dict, verdicts: dict, prepare, busy_only: bool):
        prepared = {}
        for name, function in candidates.items():
            note = verdicts[name][1]
            if note is not None:
                rows.append({**case.row(), "measure": measured, "who": name, "note": note})
                continue
            one = partial(prepare, function, x)
            one = deterministic_run(one) if "deterministic" in name else one
            prepared[name] = from_cold_cache(one) if device == "cuda" else one
        timings = time_side_by_side(prepared, device, seconds, busy_only=busy_only)
        total, work = bytes_and_operations(case, measured)
        for name, timing in timings.items():
            speed = total / (timing.ms * 1e6)
            limits = {"gb_per_s": speed, "share_of_copy": speed / peak}
            limits |= {"gflop_per_s": work / (timing.ms * 1e6), "floor_ms": total / (peak * 1e6)}
            rows.append(
                {**case.row(), "measure": measured, "who": name, **asdict(timing), **limits}
                | verdicts[name][0]
            )

    names = ("output", "value", "locations", "weights")
    expected = [part.detach() for part in sample(ms_deform_attn_pytorch, in_float32(x))]
    verdicts = errors_of(case, sampling, lambda f: sample(f, x), expected, names)
    plain_sampling = {k: v for k, v in sampling.items() if "deterministic" not in k}
    add("forward", plain_sampling, verdicts, prepare_forward, True)
    add("backward", sampling, verdicts, prepare_backward, True)
    if case.locations == "realistic":
        names = ("output", "value", "offsets", "logits")
        expected = [part.detach() for part in whole(deformable_attention_pytorch, in_float32(x))]
        verdicts = errors_of(case, modules, lambda f: whole(f, x), expected, names)
        add("module", modules, verdicts, lambda module, x: lambda: whole(module, x), False)
        if device == "cuda":
            once = {k: v for k, v in modules.items() if "deterministic" not in k}
            add("module forward", once, verdicts, prepare_module_forward, True)
            add("module backward", modules, verdicts, prepare_module_backward, True)
    return rows


def deterministic_run(prepare: Callable) -> Callable:
    return lambda: deterministic(deterministic(prepare)())


def equal_twice(case: Case, device: str) -> list[dict]:
    """Return whether two backward passes are equal bit for bit."""
    x = make_inputs(case, device)
    rows = []
    for name, wrap in (("dn_detr", lambda f: f), ("dn_detr, deterministic", deterministic)):
        run = wrap(lambda: whole(deformable_attention, x))
        first, second = run(), run()
        is_equal = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        note = "equal" if is_equal else "differs"
        rows.append({**case.row(), "measure": "twice", "who": name, "note": note})
    return rows


def prepare_module(name: str, device: str, paths: dict, case: Case) -> Callable:
    """Prepare a call for `peak_mib`, in a separate process."""
    own = {"dn_detr": deformable_attention, "dn_detr, unfused": as_module(ms_deform_attn)}
    own["plain"] = deformable_attention_pytorch
    if name in DEFORMOPS:
        module = DEFORMOPS[name]
    else:
        module = own[name] if name in own else as_module(find_peers(device, paths)[0][name])
    x = make_inputs(case, device)
    return lambda: whole(module, x)


def measure_memory(case: Case, device: str, peers: dict[str, Attend], paths: dict) -> list[dict]:
    small = replace(case, image=(128, 128), queries=min(case.queries, 100))
    rows = []
    for name in ("dn_detr", "dn_detr, unfused", "plain", *peers):
        mib = peak_mib(device, partial(prepare_module, name, device, paths), (small,), (case,))
        if mib is not None:
            rows.append({**case.row(), "measure": "peak MiB", "who": name, "mib": mib})
    return rows


def cases(args) -> list[Case]:
    if args.quick:
        return [Case(q, 2, dtype, "realistic", (64, 96)) for dtype in args.dtype for q in (0, 30)]
    batches = args.batch or ([1] if args.device == "cpu" else [2, 16])
    image = tuple(args.image)
    found = []
    for dtype in args.dtype:
        for batch in batches:
            found += [Case(q, batch, dtype, "realistic", image) for q in args.queries]
        found += [Case(q, batches[0], dtype, "uniform", image) for q in args.uniform]
    return found


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--original", type=Path, help="checkout of Deformable-DETR (CUDA)")
    parser.add_argument("--msda-triton", type=Path, help="checkout of msda-triton (CUDA)")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--queries", type=int, nargs="+", default=[0, 300, 500, 1100],
                        help="0: the encoder")  # fmt: skip
    parser.add_argument("--uniform", type=int, nargs="*", default=[1100],
                        help="queries also measured with uniform locations")  # fmt: skip
    parser.add_argument("--image", type=int, nargs=2, default=(800, 1066))
    parser.add_argument("--dtype", nargs="+", choices=list(TOLERANCES), default=["float32"])
    parser.add_argument("--measure", nargs="+", choices=("time", "memory"),
                        default=["time", "memory"])  # fmt: skip
    parser.add_argument(
        "--peak", type=float, help="memory bandwidth in GB/s; default: that of a copy"
    )
    args = parser.parse_args()
    paths = {"original": args.original, "msda_triton": args.msda_triton}
    peers, missing = find_peers(args.device, paths)
    for sentence in missing:
        print("not measured:", sentence)
    peak = args.peak or copy_bandwidth(args.device, 1 if args.quick else 256)
    seconds = args.seconds if args.seconds is not None else (0.0 if args.quick else 1.0)
    keys = ("case", "batch", "dtype", "locations", "measure")
    facts = {"missing": missing, "copy_gb_per_s": peak, "against": "dn_detr"}
    first = cases(args)[0]
    parts = []
    if "time" in args.measure:
        parts = [partial(measure, case, args.device, peers, seconds, peak) for case in cases(args)]
        parts.append(partial(equal_twice, first, args.device))
    if "memory" in args.measure:
        parts.append(partial(measure_memory, first, args.device, peers, paths))
    for part in parts:  # what is printed and saved stays if time runs out in the next one
        rows = part()
        print(table(rows, keys, against="dn_detr"))
        for row in rows:
            describe(row)
        save(args, "ms_deform_attn", rows, keys=keys, **facts)
        print(flush=True)


def describe(row: dict) -> None:
    """Print the error of a result, or how near to its limits dn_detr is."""
    name = f"  {row['measure']}, {row['who']}"
    if row["who"] in LOSSY and row["dtype"] == "bfloat16" and "error" in row:
        print(f"{name}: {row['error_of']} off by {row['error']:.2g}")
    if row["who"] == "dn_detr" and "gb_per_s" in row:
        print(
            f"{name}: {row['gb_per_s']:.1f} GB/s, {row['share_of_copy']:.0%} of a copy (at least "
            f"{row['floor_ms']:.2g} ms), {row['gflop_per_s']:.0f} GFLOP/s"
        )


if __name__ == "__main__":
    main()
