"""Call every operator on the CPU with random sizes, dtypes, layouts, values and integers.

    python tests/ops/fuzz_operators.py --trials 2000 --seed 0

`make sanitize` runs it on operators compiled with the address and undefined behaviour sanitizers.
Sizes may be zero or absurd, shapes and dtypes wrong, memory transposed, shifted, strided or
expanded, numbers NaN or infinite. In each trial the kernel and its reference implementation either
return the same, within the bounds of the tests, or both raise a ValueError or a RuntimeError with a
sentence. Trial n of a seed is always the same.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import traceback
import warnings

import torch

from dn_detr import ops
from dn_detr.losses.linear_assignment import solve_pytorch
from dn_detr.losses.matching_costs import Costs, Objects
from dn_detr.ops.matching import assign_objects, has_nonfinite, matching_costs

ABSURD = (-(2**63), -(2**31), -1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1)
NONFINITE = (float("nan"), float("inf"), float("-inf"), 3e38, -3e38)
FLOATS = (torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {
    torch.float64: {"rtol": 1e-8, "atol": 1e-8},
    torch.float32: {"rtol": 1e-4, "atol": 3e-4},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
}


class NoSuchTensor(Exception):
    """PyTorch has no tensors of this absurd shape: the strides of one overflow."""


class Trial:
    """The random choices of one trial."""

    def __init__(self, seed: int, number: int):
        self.choose = random.Random(f"{seed} {number}")
        self.generator = torch.Generator().manual_seed(self.choose.getrandbits(60))
        self.is_finite = self.chance(0.8)
        self.is_valid = self.chance(0.6)

    def chance(self, probability):
        return self.choose.random() < probability

    def size(self, *sizes):
        return 0 if self.chance(0.06) else self.choose.choice(sizes)

    def rand(self, shape, low=0.0, high=1.0, dtype=torch.float64):
        """Uniform numbers, or empty memory of an absurd shape."""
        try:
            numbers = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        except RuntimeError as error:
            raise NoSuchTensor from error
        numbers = numbers * (high - low) + low
        if not self.is_finite and numbers.numel() and self.chance(0.5):
            for _ in range(self.choose.randint(1, 3)):
                at = self.choose.randrange(numbers.numel())
                numbers.view(-1)[at] = self.choose.choice(NONFINITE)
        return self.layout(numbers.to(dtype))

    def integers(self, shape, below):
        return self.layout(torch.randint(below, shape, generator=self.generator))

    def layout(self, x):
        """The numbers in another layout of memory; an expanded dimension repeats its first."""
        kind = self.choose.randrange(8) if max(x.shape, default=0) < 2**31 else -1
        if kind == 0:
            return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
        if kind == 1:
            return torch.stack((x, x), dim=-1)[..., 0]
        if kind == 2 and x.ndim > 1:
            first, second = self.choose.sample(range(x.ndim), 2)
            return x.transpose(first, second).contiguous().transpose(first, second)
        if kind == 3 and x.ndim > 0 and x.numel() and not x.dtype.is_floating_point:
            return x.clone()
        if kind == 4 and x.ndim > 2 and x.numel():
            dim = self.choose.randrange(x.ndim)
            return x.narrow(dim, 0, 1).expand(x.shape)
        return x

    def spoil(self, arguments):
        """In some trials, change the shape or dtype of one tensor, or a number to an absurd one."""
        if self.is_valid:
            return arguments
        names = [name for name, value in arguments.items() if self.is_spoilable(value)]
        name = self.choose.choice(names)
        return {**arguments, name: self.spoiled(arguments[name])}

    @staticmethod
    def is_spoilable(value):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_sequence = isinstance(value, (list, tuple)) and len(value) > 0
        return is_number or is_sequence or isinstance(value, torch.Tensor)

    def spoiled(self, value):
        if isinstance(value, float):
            return self.choose.choice(NONFINITE)
        if isinstance(value, int):
            return self.choose.choice(ABSURD)
        if isinstance(value, (list, tuple)):  # also of pairs, or of tensors and None
            at = self.choose.randrange(len(value))
            if value[at] is None:
                return value[1:]
            changed = self.spoiled(value[at])
            return type(value)([*value[:at], changed, *value[at + 1 :]])
        kind = self.choose.randrange(4)
        if kind == 0:
            return value[:-1]
        if kind == 1:
            return value[..., :1] if value.ndim and value.shape[-1] > 1 else value[..., None]
        if kind == 2:
            return value[..., None]
        dtypes = {torch.int32, torch.int64, torch.float16, torch.float64, torch.bool}
        other = self.choose.choice(sorted(dtypes - {value.dtype}, key=str))
        return value.detach().nan_to_num(0, 1, 0).to(other)


# ------------------------------------------------------------------------------------- operators


def levels_of(t):
    """(h, w) of each level, and S; sometimes without cells."""
    shapes = [(t.size(1, 2, 3, 5), t.size(1, 2, 4, 7)) for _ in range(t.choose.randint(1, 4))]
    return tuple(shapes), sum(h * w for h, w in shapes)


def attention_sizes(t):
    """B, Q, H, D and P; in some trials one is absurd and the images are none."""
    sizes = [t.size(1, 2, 3), t.size(1, 4, 9, 20), t.size(1, 2, 3, 8), t.size(1, 3, 8, 20, 32, 70)]
    sizes.append(t.size(1, 2, 4, 7))
    if t.chance(0.05):
        sizes[0] = 0
        sizes[t.choose.randrange(1, 5)] = t.choose.choice((2**31, 2**40, 2**62))
    return sizes


def gradients(function, leaves, seed):
    """(output, and the gradients of the leaves); without any cell, it may depend on none."""
    output = function()
    if not output.requires_grad:
        return output, *map(torch.zeros_like, leaves)
    grad = torch.rand(output.shape, generator=torch.Generator().manual_seed(seed))
    return output, *torch.autograd.grad(output, leaves, grad.to(output.dtype))


def compare_attention(t, kernel, reference, arguments, names):
    """Compare outputs and gradients; with numbers that are not finite, only where outputs are."""
    names = [name for name in names if arguments[name].is_floating_point()]
    leaves = [arguments[name].requires_grad_() for name in names]
    seed = t.choose.getrandbits(30)
    torch.set_num_threads(t.choose.choice((1, 2, 5)))
    results = both(*(lambda f=f: gradients(lambda: f(*arguments.values()), leaves, seed)
                     for f in (kernel, reference)))  # fmt: skip
    if results is None:
        return "refused"
    got, expected = results
    # The gradients of positions jump between cells: rounding may choose another one.
    is_exact = arguments["value"].dtype == torch.float64
    is_smooth = [True, *(is_exact or name in ("value", "logits", "weights") for name in names)]
    for x, want, smooth in zip(got, expected, is_smooth, strict=True):
        if t.is_finite and smooth:
            torch.testing.assert_close(x, want, **TOLERANCE[arguments["value"].dtype])
    if not t.is_finite:
        # The kernel is finite in more places: it leaves out padded cells, whatever their weight.
        is_finite = expected[0].isfinite()
        torch.testing.assert_close(
            got[0][is_finite], expected[0][is_finite], **TOLERANCE[arguments["value"].dtype]
        )
    return "equal"


def fuzz_ms_deform_attn(t):
    shapes, tokens = levels_of(t)
    batch, queries, heads, channels, points = attention_sizes(t)
    dtype = t.choose.choice(FLOATS)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = {
        "value": t.rand((batch, tokens, heads, channels), -1, 1, dtype),
        "shapes": shapes,
        "locations": t.rand((batch, queries, heads, len(shapes), points, 2), -0.4, 1.4, precise),
        "weights": t.rand((batch, queries, heads, len(shapes), points), dtype=precise),
    }
    return compare_attention(
        t, ops.ms_deform_attn, ops.ms_deform_attn_pytorch, t.spoil(arguments),
        ("value", "locations", "weights"),
    )  # fmt: skip


def fuzz_deformable_attention(t):
    shapes, tokens = levels_of(t)
    batch, queries, heads, channels, points = attention_sizes(t)
    dtype = t.choose.choice(FLOATS)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    stored = t.choose.choice((dtype, precise))
    levels, width = len(shapes), t.choose.choice((2, 4))
    per_level = (levels,) if t.chance(0.5) else ()
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=precise).view(1, levels, 2)
    arguments = {
        "value": t.rand((batch, tokens, heads, channels), -1, 1, dtype),
        "shapes": shapes,
        "valid_sizes": (sizes * t.choose.choice((1, 0.6))).ceil().expand(batch, levels, 2),
        "reference": t.rand((batch, queries, *per_level, width), dtype=precise),
        "offsets": t.rand((batch, queries, heads, levels, points, 2), -3, 3, stored),
        "logits": t.rand((batch, queries, heads, levels * points), -3, 3, stored),
        "padding": t.rand((batch, tokens)) < 0.2 if t.chance(0.5) else None,
    }
    return compare_attention(
        t, ops.deformable_attention, ops.deformable_attention_pytorch, t.spoil(arguments),
        ("value", "reference", "offsets", "logits"),
    )  # fmt: skip


def fuzz_noise_objects(t):
    batch, most = t.size(1, 2, 5), t.size(1, 3, 8, 40)
    counts = torch.randint(most + 1, (batch, 1), generator=t.generator)
    arguments = {
        "labels": t.integers((batch, most), 7),
        "boxes": t.rand((batch, most, 4), dtype=t.choose.choice(FLOATS[1:3])),
        "is_object": torch.arange(most) < counts,
        "noise_seeds": t.integers((batch,), 2**62) * t.choose.choice((1, -1)),
        "num_groups": t.size(1, 2, 5, 12),
        "slots_per_group": t.choose.randint(0, most),
        "num_classes": t.choose.choice((1, 7, 91, 2**31 - 1)),
        "box_noise": t.choose.choice((0.0, 0.4, 1.0, 3.0)),
        "label_noise": t.choose.choice((0.0, 0.3, 1.0)),
        "contrastive": t.chance(0.5),
        "num_matched": t.size(1, 3, 17),
        "mask_dtype": t.choose.choice((*FLOATS, torch.int64 if t.chance(0.1) else torch.float32)),
        "hide_empty": t.chance(0.5),
    }
    spoiled = t.spoil(arguments)
    results = both(*(lambda f=f: f(**spoiled)
                     for f in (ops.noise_objects, ops.noise_objects_pytorch)))  # fmt: skip
    if results is None:
        return "refused"
    for x, want in zip(*results, strict=True):
        torch.testing.assert_close(x, want, rtol=0, atol=0, equal_nan=True)
    return "equal"


def image_of(t, batch, objects):
    if batch == 0:
        return torch.zeros(0, dtype=torch.int64)
    return t.layout(torch.randint(batch, (objects,), generator=t.generator).sort().values)


def fuzz_assign_objects(t):
    batch, segments = t.size(1, 2, 4), t.choose.randint(0, 3)
    images = image_of(t, batch, t.size(1, 4, 11))
    dtype = t.choose.choice(FLOATS[1:3])
    groups = [t.choose.choice((1, 2, 3)) for _ in range(segments)]
    slots = [count * t.size(1, 2, 5, 20) for count in groups]
    layers = t.size(1, 2)
    arguments = {
        "costs": [t.rand((layers, len(images), n), -1, 1, dtype) for n in slots],
        "image_of": images,
        "batch": batch,
        "is_empty": [t.rand((batch, n)) < 0.3 if t.chance(0.5) else None for n in slots],
        "num_groups": groups,
        "matches_per_object": [t.choose.choice((1, 1, 2, 6, 2**20)) for _ in groups],
    }
    spoiled = t.spoil(arguments)
    torch.set_num_threads(t.choose.choice((1, 2, 5)))
    is_number = any(spoiled[k] != arguments[k] for k in ("batch", *list(arguments)[4:]))
    if t.is_valid or is_number:
        results = both(lambda: assign_objects(**spoiled), lambda: solve_pytorch(**spoiled))
    else:  # the reference implementation leaves tensors to its caller
        results = both(lambda: assign_objects(**spoiled), None)
    if results is None:
        return "refused"
    if results[1] is None:
        return "no crash"
    (got, got_bad), (want, want_bad) = results
    assert all(map(torch.equal, got_bad, want_bad)), "other costs are not finite"
    for cost, x, y in zip(spoiled["costs"], got, want, strict=True):
        assert torch.equal((x >= 0).sum(-1), (y >= 0).sum(-1)), "another number of matches"
        # Not the same matches: equal costs, and huge ones, have several solutions.
        torch.testing.assert_close(total(cost, images, x), total(cost, images, y))
    return "equal"


def total(cost, images, object_of):
    """Cost [L, B] of an assignment, of costs [L, T, Q] and objects [L, B, Q]."""
    first = torch.searchsorted(images.contiguous(), torch.arange(object_of.shape[1]))
    row = (object_of + first[:, None]).clamp(0, max(len(images) - 1, 0))
    costs = torch.zeros(object_of.shape, dtype=torch.float64)
    if len(images):
        costs = cost.double().gather(1, row).where(object_of >= 0, 0)
    return costs.sum(-1)


def fuzz_matching_costs(t):
    layers, batch, queries, classes = t.size(1, 2), t.size(1, 3), t.size(1, 5, 300), t.size(1, 4, 9)
    images = image_of(t, batch, t.size(1, 4, 11) if classes else 0)
    dtype = t.choose.choice(FLOATS[1:3])
    labels = t.integers((len(images),), max(classes, 1))
    arguments = {
        "logits": t.rand((layers, batch, queries, classes), -4, 4, dtype),
        "boxes": t.rand((layers, batch, queries, 4), 0.1, 0.6, dtype),
        "image_of": images,
        "labels": labels,
        "object_boxes": t.rand((len(images), 4), 0.1, 0.6, dtype),
    }
    weights = {"class_cost": 2.0, "l1": 5.0, "giou": 2.0, "alpha": 0.25, "gamma": 2.0}
    is_softmax = t.chance(0.5)
    spoiled = t.spoil(arguments)
    torch.set_num_threads(t.choose.choice((1, 2, 5)))
    costs = Costs(**weights, kind="softmax" if is_softmax else "focal")

    def reference():
        logits, boxes, images, labels, object_boxes = spoiled.values()
        objects = Objects(images, labels, object_boxes, None, torch.zeros(batch))
        return costs.compute_pytorch(logits, boxes, objects)

    def kernel():
        return matching_costs(**spoiled, **weights, is_softmax=is_softmax)

    is_compared = t.is_valid and t.is_finite
    results = both(kernel, reference if is_compared else None)
    if results is None:
        return "refused"
    if not is_compared:
        return "no crash"
    torch.testing.assert_close(*results, **TOLERANCE[dtype])
    return "equal"


def fuzz_has_nonfinite(t):
    shape = [t.size(1, 2, 3), t.size(1, 2, 3), t.size(1, 5, 30), t.size(1, 4, 91)]
    if t.chance(0.1):
        zero, absurd = t.choose.sample(range(4), 2)
        shape[zero], shape[absurd] = 0, t.choose.choice((0, 2**31, 2**62))
    arguments = {
        "values": t.rand(shape, -1, 1, t.choose.choice(FLOATS[1:3])),
        "is_empty": t.rand(shape[1:3]) < 0.3 if max(shape) < 2**31 and t.chance(0.5) else None,
    }
    spoiled = t.spoil(arguments)
    torch.set_num_threads(t.choose.choice((1, 2, 5)))

    def reference():
        bad = ~spoiled["values"].isfinite()
        if spoiled["is_empty"] is not None:
            bad = bad & ~spoiled["is_empty"][None, :, :, None]
        return bad.flatten(2).any(-1)

    is_compared = t.is_valid and max(shape) < 2**31
    results = both(lambda: has_nonfinite(**spoiled), reference if is_compared else None)
    if results is None:
        return "refused"
    if not is_compared:
        return "no crash"
    assert torch.equal(*results), "others are not finite"
    return "equal"


OPERATORS = {
    name.removeprefix("fuzz_"): function
    for name, function in list(globals().items())
    if name.startswith("fuzz_")
}


# --------------------------------------------------------------------------------------- contract


def sentence_of(function):
    """(result, None), or (None, the message of its ValueError or RuntimeError)."""
    try:
        return function(), None
    except (ValueError, RuntimeError) as error:
        text = str(error)
        if len(text.split()) < 4 or "std::" in text or "vector::" in text:
            raise AssertionError(f"no sentence: {text!r}") from error
        return None, text


def both(kernel, reference):
    """The results of both, or None if both refuse. reference None: only the kernel is called."""
    got, refusal = sentence_of(kernel)
    if reference is None:
        return None if refusal else (got, None)
    expected, other = sentence_of(reference)
    if (refusal is None) != (other is None):
        raise AssertionError(f"kernel: {refusal or 'a result'}; reference: {other or 'a result'}")
    return None if refusal else (got, expected)


def run(trials: int, seed: int, first: int = 0) -> tuple[collections.Counter, list[str]]:
    """Return how often each operator ended how, and a description of each failure."""
    counts, failures = collections.Counter(), []
    threads = torch.get_num_threads()
    for number in range(first, first + trials):
        t = Trial(seed, number)
        name = t.choose.choice(list(OPERATORS))
        try:
            counts[name, OPERATORS[name](t)] += 1
        except NoSuchTensor:
            counts[name, "no tensor"] += 1
        except Exception:
            failures.append(f"{name}, --seed {seed} --first {number}:\n{traceback.format_exc()}")
    torch.set_num_threads(threads)
    return counts, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    counts, failures = run(arguments.trials, arguments.seed, arguments.first)
    for (name, end), count in sorted(counts.items()):
        print(f"{name:22} {end:9} {count}")
    print(*failures[:5], sep="\n")
    capability = torch.backends.cpu.get_cpu_capability()
    sys.exit(
        f"{len(failures)} failures" if failures else
        print(f"{arguments.trials} trials on {capability}, no failure")
    )  # fmt: skip


if __name__ == "__main__":
    main()
