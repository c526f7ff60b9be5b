"""Deformable attention from references, offsets and logits: definition, gradients, traps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import BORDER
from deformable_cases import (
    Inputs,
    away_from_whole_cells,
    by_definition,
    by_sampling_a_grid,
    make_inputs,
    run,
)

from dn_detr.ops import deformable_attention, deformable_attention_pytorch
from dn_detr.ops.extension import KERNELS

NAMES = ("output", "grad_value", "grad_reference", "grad_offsets", "grad_logits")
REFERENCES = [
    pytest.param({"coordinates": c, "per_level": p}, id=f"{name}{' per level' * p}")
    for c, name in ((2, "point"), (4, "box"))
    for p in (False, True)
]


def assert_close(results, expected, **tolerance):
    for name, got, want in zip(NAMES, results, expected, strict=True):
        torch.testing.assert_close(
            got.cpu().double(), want.cpu().double(), msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def without_sums(results):
    """The results but the gradient of the values, whose sums may come in any order on a GPU."""
    return results[0], torch.zeros(()), *results[2:]


def one_sample(device, x, y, shape):
    """One head, level and point, one channel; value k + 1 at cell k; (x, y) in cells.

    The reference is the middle of the level, the rest is the offset."""
    height, width = shape
    dtype = torch.float64
    value = torch.arange(1, height * width + 1, dtype=dtype, device=device).view(1, -1, 1, 1)
    offset = torch.tensor([x + 0.5 - width / 2, y + 0.5 - height / 2], dtype=dtype, device=device)
    inputs = Inputs(
        value,
        (shape,),
        torch.tensor([[[width, height]]], dtype=dtype, device=device),
        torch.full((1, 1, 2), 0.5, dtype=dtype, device=device),
        offset.view(1, 1, 1, 1, 1, 2),
        torch.zeros(1, 1, 1, 1, dtype=dtype, device=device),
        None,
    )
    return inputs.like(torch.clone)


# ---------------------------------------------------------------------------- definition


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("is_padded", [False, True])
def test_output_equals_plain_loops(deform, reference, is_padded):
    function, device = deform
    sizes = {**reference, "is_padded": is_padded, "queries": 3, "channels": 3}
    expected = by_definition(*make_inputs(**sizes))
    output = function(*make_inputs(**sizes, device=device))
    torch.testing.assert_close(output.cpu(), expected.detach())


@pytest.mark.parametrize("channels", [1, 8, 16, 20, 32, 33, 64, 100, 256])
def test_output_and_gradients_equal_grid_sample(deform, channels):
    function, device = deform
    expected = run(by_sampling_a_grid, make_inputs(channels=channels, coordinates=4))
    results = run(function, make_inputs(channels=channels, coordinates=4, device=device))
    assert_close(results, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("is_padded", [False, True])
def test_gradients_equal_finite_differences(deform, reference, is_padded):
    function, device = deform
    inputs = away_from_whole_cells(
        make_inputs(
            2, 2, 2, 3, 2, ((3, 4), (2, 2)), **reference, is_padded=is_padded
        )
    )  # fmt: skip
    inputs = inputs.like(lambda x: x.to(device))

    def of_leaves(value, reference, offsets, logits):
        return function(
            value, inputs.shapes, inputs.valid_sizes.to(device), reference, offsets, logits,
            inputs.padding.to(device) if is_padded else None,
        )  # fmt: skip

    # On a GPU sums come in any order: two backwards may differ in the last bit.
    torch.autograd.gradcheck(of_leaves, inputs.leaves, nondet_tol=0 if device == "cpu" else 1e-12)


@pytest.mark.parametrize("reference", REFERENCES)
def test_gradients_of_one_level_have_the_shape_of_their_reference(deform, reference):
    """[B, Q, 1, 2 or 4] beside [B, Q, 2 or 4]; the GPU's backward gave the shape of the latter."""
    function, device = deform
    sizes = {**reference, "shapes": ((5, 7),)}
    expected = run(by_sampling_a_grid, make_inputs(**sizes))
    results = run(function, make_inputs(**sizes, device=device))
    assert_close(results, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("points", [1, 3, 17])
@pytest.mark.parametrize(
    "shapes", [((4, 4),), ((1, 9), (9, 1)), ((8, 8), (4, 4), (2, 2), (1, 1), (3, 5))]
)
def test_any_number_of_levels_and_points(deform, shapes, points):
    function, device = deform
    sizes = {"shapes": shapes, "points": points, "channels": 8, "coordinates": 4}
    assert_close(
        run(function, make_inputs(**sizes, device=device)),
        run(by_sampling_a_grid, make_inputs(**sizes)),
        rtol=1e-9,
        atol=1e-9,
    )


def test_many_queries_are_all_computed(deform):
    """More rows than one thread or block of threads takes."""
    function, device = deform
    precise = away_from_whole_cells(make_inputs(queries=1003, heads=2, channels=8, batch=3))
    inputs = precise.like(lambda x: x.to(device, torch.float32))._replace(
        valid_sizes=precise.valid_sizes.to(device, torch.float32),
        padding=precise.padding.to(device),
    )
    expected = run(by_sampling_a_grid, precise)
    assert_close(run(function, inputs), expected, rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_logits_are_compared_not_exponentiated(deform, shift):
    """exp(10 000) is infinite, but a constant added to all logits of a head changes nothing."""
    function, device = deform
    inputs = make_inputs(device=device, channels=8)
    expected = run(function, inputs)
    assert_close(
        run(function, inputs._replace(logits=(inputs.logits + shift).detach().requires_grad_())),
        expected,
        rtol=1e-8,
        atol=1e-8,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_logit_of_minus_infinity_switches_its_sample_off(deform, dtype):
    function, device = deform
    inputs = make_inputs(dtype=dtype, device=device, channels=8, shapes=((4, 4),), points=3)
    with torch.no_grad():
        inputs.logits[..., 1] = -torch.inf
    keep = [0, 2]
    few = inputs._replace(offsets=inputs.offsets[..., keep, :], logits=inputs.logits[..., keep])
    output, _, _, grad_offsets, grad_logits = run(function, inputs)
    torch.testing.assert_close(output, function(*few))
    assert (grad_offsets[..., 1, :] == 0).all() and (grad_logits[..., 1] == 0).all()


# ----------------------------------------------------------------------------- precision


@pytest.mark.parametrize("channels", [5, 32])
@pytest.mark.parametrize("reference", [REFERENCES[0], REFERENCES[3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_pytorch(deform, dtype, reference, channels):
    """Against float64 on the same rounded inputs; plain: softmax and `grid_sample` in that type."""
    function, device = deform
    inputs = make_inputs(
        queries=30, channels=channels, **reference, dtype=dtype, offset_dtype=dtype, device=device
    )
    rounded = make_inputs(
        queries=30, channels=channels, **reference, dtype=dtype, offset_dtype=dtype
    ).like(lambda x: x.to(dtype))
    rounded = rounded._replace(valid_sizes=rounded.valid_sizes.to(dtype))
    precise = rounded.like(lambda x: x.double())
    precise = precise._replace(valid_sizes=rounded.valid_sizes.double())
    with torch.no_grad():  # the reference, which is always float32, as plain PyTorch has it
        inputs.reference.copy_(rounded.reference)
    truth, plain = run(by_sampling_a_grid, precise), run(by_sampling_a_grid, rounded)
    for name, got, other, want in zip(NAMES, run(function, inputs), plain, truth, strict=True):
        error = (got.double().cpu() - want).abs().mean()
        allowed = (other.double() - want).abs().mean()
        assert error <= 2 * allowed + 1e-7, name


@pytest.mark.parametrize(
    ("dtype", "offset_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
def test_result_and_gradients_have_the_types_of_their_inputs(deform, dtype, offset_dtype):
    function, device = deform
    inputs = make_inputs(dtype=dtype, offset_dtype=offset_dtype, device=device)
    output, *gradients = run(function, inputs)
    assert output.dtype == dtype
    assert [g.dtype for g in gradients] == [x.dtype for x in inputs.leaves]


def test_offsets_and_logits_may_differ_in_type(deform):
    function, device = deform
    inputs = make_inputs(dtype=torch.bfloat16, device=device)
    logits = inputs.logits.detach().bfloat16().requires_grad_()
    mixed = run(function, inputs._replace(logits=logits))
    same = run(function, inputs._replace(logits=logits.detach().float().requires_grad_()))
    assert mixed[4].dtype == torch.bfloat16
    assert_close(without_sums(mixed), without_sums((*same[:4], same[4].bfloat16())), rtol=0, atol=0)
    torch.testing.assert_close(mixed[1], same[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_values_and_their_gradients_are_summed_in_single_precision(deform, dtype):
    """4096 queries that all see the one cell: half precision sums would stop at 256 or 2048."""
    function, device = deform
    inputs = Inputs(
        torch.ones(1, 1, 1, 8, dtype=dtype, device=device),
        ((1, 1),),
        torch.ones(1, 1, 2, device=device),
        torch.full((1, 4096, 2), 0.5, device=device),
        torch.zeros(1, 4096, 1, 1, 1, 2, device=device),
        torch.zeros(1, 4096, 1, 1, device=device),
        None,
    ).like(torch.clone)
    output, grad_value, *_ = run(function, inputs, torch.ones(1, 4096, 8))
    assert (output == 1).all() and (grad_value == 4096).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coordinates_are_not_rounded_to_half_precision(deform, dtype):
    """At cell 301.25, bfloat16 knows multiples of 2 only, float16 multiples of 0.25."""
    function, device = deform
    inputs = Inputs(
        torch.arange(400, device=device).remainder(2).to(dtype).view(1, -1, 1, 1),
        ((1, 400),),
        torch.tensor([[[400.0, 1.0]]], device=device),
        torch.tensor([[[301.625 / 400, 0.5]]], device=device),
        torch.zeros(1, 1, 1, 1, 1, 2, dtype=dtype, device=device),
        torch.zeros(1, 1, 1, 1, dtype=dtype, device=device),
        None,
    )
    # Centre of cell 301 (which holds 1) is at 301.5: 0.125 of the way to cell 302 (0).
    assert abs(function(*inputs).item() - 0.875) < 0.005


def test_autocast_changes_nothing_but_the_types_that_it_is_given(deform):
    function, device = deform
    inputs = make_inputs(shapes=((2, 400),), channels=8, dtype=torch.float32, device=device)
    expected = function(*inputs)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(function(*inputs), expected)
        half = function(inputs.value.bfloat16(), *inputs[1:])
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.03)


# ---------------------------------------------------------------------------- boundaries


@pytest.mark.parametrize(("x", "y", "output", "grad_x"), BORDER)
def test_values_and_gradients_at_the_border(deform, x, y, output, grad_x):
    function, device = deform
    result, _, grad_reference, grad_offsets, _ = run(
        function, one_sample(device, x, y, (2, 4)), torch.ones(1, 1, 1)
    )
    assert result.item() == output
    assert grad_offsets[..., 0].item() == grad_x
    assert grad_reference[..., 0].item() == grad_x * 4  # cells per unit


BAD = [float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 3e9, -3e9]


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", BAD)
def test_impossible_offsets_contribute_nothing(deform, bad, dtype, coordinates):
    function, device = deform
    inputs = make_inputs(dtype=dtype, device=device, channels=8, coordinates=coordinates)
    far = inputs.like(torch.clone)
    with torch.no_grad():
        inputs.offsets[:, 1, :, :, 2, 1] = bad
        inputs.offsets[:, 3, :, 0, 1, 0] = bad
        far.offsets[:, 1, :, :, 2, 1] = 1e6
        far.offsets[:, 3, :, 0, 1, 0] = 1e6
    results, expected = run(function, inputs), run(function, far)
    assert (results[3][:, 1, :, :, 2] == 0).all()
    if function is deformable_attention_pytorch:  # says so
        results, expected = ((*r[:2], r[0], *r[3:]) for r in (results, expected))
    assert_close(without_sums(results), without_sums(expected), rtol=0, atol=0)
    torch.testing.assert_close(results[1], expected[1])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("reference", REFERENCES)
def test_an_impossible_reference_gives_zero(deform, bad, reference):
    function, device = deform
    inputs = make_inputs(device=device, channels=8, **reference)
    expected = run(function, inputs)
    with torch.no_grad():
        inputs.reference[:, 2, ..., :2] = bad
    results = run(function, inputs)
    assert all(torch.isfinite(r).all() for r in results)
    assert all((results[i][:, 2] == 0).all() for i in (0, 2, 3, 4))
    assert torch.equal(results[0][:, [0, 1, 3, 4]], expected[0][:, [0, 1, 3, 4]])


def test_a_query_without_samples_inside_gives_zero_even_if_a_logit_is_nan(deform):
    """The kernel for GPUs gave NaN: zero divided by the sum of the softmax."""
    function, device = deform
    inputs = make_inputs(device=device, channels=8)
    with torch.no_grad():
        inputs.offsets[:, 1] = 1e6
        inputs.logits[:, 1, :, 0] = float("nan")
    assert (function(*inputs)[:, 1] == 0).all()


def test_nan_next_door_is_not_multiplied_by_zero(deform):
    """Corners outside of the map must not be read in clamped form: another cell may hold NaN."""
    function, device = deform
    inputs = one_sample(device, -0.25, 0.0, (2, 4))
    with torch.no_grad():
        inputs.value[:, [1, 2, 3, 5, 6, 7]] = float("nan")
    results = run(function, inputs, torch.ones(1, 1, 1))
    assert results[0].item() == 0.75
    assert all(torch.isfinite(r).all() for r in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_padded_tokens_count_as_zero_whatever_they_hold(deform, dtype):
    function, device = deform
    inputs = make_inputs(queries=40, channels=8, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(1)
    padding = torch.rand(inputs.padding.shape, generator=generator) < 0.3  # not only at the border
    inputs = inputs._replace(padding=padding.to(device))
    zeroed, poisoned = inputs.like(torch.clone), inputs.like(torch.clone)
    with torch.no_grad():
        zeroed.value[inputs.padding] = 0
        poisoned.value[inputs.padding] = float("nan")
    expected = run(function, zeroed._replace(padding=None))
    results = run(function, poisoned)
    assert (results[1][inputs.padding] == 0).all()
    with torch.no_grad():
        expected[1][inputs.padding] = 0
    assert_close(results, expected, rtol=1e-5, atol=1e-5)


def test_levels_do_not_leak_into_each_other(deform):
    """Beyond the last row of a level lies the first row of the next one in memory."""
    function, device = deform
    inputs = make_inputs(
        shapes=((2, 2), (2, 2)), points=1, device=device, channels=8, is_padded=False
    )
    with torch.no_grad():
        inputs.offsets[..., 0, :, 1] = 1.9 - inputs.reference[:, :, None, None, 1] * 2
        inputs.value[:, 4:] = float("nan")
        inputs.offsets[..., 1, :, :] = 50
    results = run(function, inputs)
    assert (results[0] != 0).any() and all(torch.isfinite(r).all() for r in results)


# -------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("per_level", [False, True])
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"heads": 0}])
def test_empty_inputs_give_empty_or_zero_results(deform, sizes, per_level):
    function, device = deform
    inputs = make_inputs(**sizes, channels=8, device=device, per_level=per_level)
    output, *gradients = run(function, inputs)
    assert output.shape == (
        inputs.value.shape[0],
        inputs.offsets.shape[1],
        inputs.value.shape[2] * 8,
    )
    for gradient, leaf in zip(gradients, inputs.leaves, strict=True):
        assert gradient.shape == leaf.shape and (gradient == 0).all()


@pytest.mark.parametrize("empty", [(0, 5), (3, 0), (0, 0)])
def test_level_without_cells_contributes_nothing_but_its_weight(deform, empty):
    """As if the level's cells were zero: its samples keep their share of the softmax."""
    function, device = deform
    inputs = make_inputs(shapes=((3, 4), empty, (2, 2)), device=device, channels=8, is_padded=False)
    other = make_inputs(shapes=((3, 4), (1, 1), (2, 2)), device=device, channels=8, is_padded=False)
    value = torch.cat(
        (inputs.value[:, :12], torch.zeros_like(inputs.value[:, :1]), inputs.value[:, 12:]), 1
    )
    other = other._replace(
        value=value, reference=inputs.reference, offsets=inputs.offsets, logits=inputs.logits
    )
    output, _, _, grad_offsets, grad_logits = run(function, inputs)
    torch.testing.assert_close(output, function(*other))
    assert (grad_offsets[:, :, :, 1] == 0).all() and torch.isfinite(grad_logits).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_layout_does_not_matter(deform, dtype):
    """Sliced heads, transposed queries, an odd storage offset, every second number."""
    function, device = deform
    inputs = make_inputs(channels=8, dtype=dtype, device=device, coordinates=4)
    expected = run(function, inputs)

    def shifted(x):
        return torch.empty(x.numel() + 1, dtype=x.dtype, device=device)[1:].view_as(x).copy_(x)

    def turned(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    def spread(x):
        return torch.stack((x, x), dim=-1)[..., 0]

    def sliced(x):
        return torch.cat((x, x), dim=2)[:, :, : x.shape[2]]

    for layout in (shifted, turned, spread, sliced):
        other = inputs.like(layout)
        other = other._replace(
            valid_sizes=layout(inputs.valid_sizes), padding=turned(inputs.padding)
        )
        assert_close(run(function, other), expected, rtol=1e-5, atol=1e-5)


def test_expanded_output_gradient(deform):
    """`sum().backward()` hands down a gradient with strides of zero."""
    function, device = deform
    inputs = make_inputs(device=device, channels=8)
    expected = run(function, inputs, torch.ones(2, 5, 24))
    gradients = torch.autograd.grad(function(*inputs).sum(), inputs.leaves)
    for got, want in zip(gradients, expected[1:], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("needed", ["value", "reference", "offsets", "logits"])
def test_only_needed_gradients_may_be_asked_for(deform, needed):
    function, device = deform
    inputs = make_inputs(device=device)
    expected = dict(zip(NAMES, run(function, inputs, torch.ones(2, 5, 12)), strict=True))
    detached = inputs._replace(
        **{
            name: getattr(inputs, name).detach()
            for name in ("value", "reference", "offsets", "logits")
        }
    )
    leaf = getattr(inputs, needed)
    output = function(*detached._replace(**{needed: leaf}))
    (gradient,) = torch.autograd.grad(output.sum(), leaf)
    torch.testing.assert_close(gradient, expected[f"grad_{needed}"])


def test_nothing_but_the_inputs_is_kept_for_the_backward(deform_device):
    inputs = make_inputs(dtype=torch.float32, device=deform_device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda x: x):
        deformable_attention(*inputs)
    assert set(kept) == {x.data_ptr() for x in inputs if isinstance(x, torch.Tensor)}


def test_no_gradient_of_the_reference_is_made_where_none_is_asked_for(deform_device):
    value, shapes, *others = (
        x.detach() if isinstance(x, torch.Tensor) else x for x in make_inputs(device=deform_device)
    )
    sides = [side for shape in shapes for side in shape]
    results = torch.ops.dn_detr.deformable_attention_backward(
        torch.ones(2, 5, 12, dtype=torch.float64, device=deform_device),
        value,
        sides,
        *others,
        False,
    )
    assert results[1].shape == (0,)


# --------------------------------------------------------------------------- determinism


@pytest.mark.skipif("cpu" not in KERNELS.get("deformable_attention", ()), reason="no CPU kernels")
def test_cpu_result_is_the_same_for_any_number_of_threads():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            inputs = make_inputs(queries=101, channels=32, coordinates=4, dtype=torch.float32)
            results.append(run(deformable_attention, inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_is_reproducible_where_asked_for(deform_device, dtype):
    # Many samples on few cells: the order of additions would show.
    inputs = make_inputs(
        queries=3000, shapes=((2, 2),), channels=32, dtype=dtype, device=deform_device
    )
    grad_output = torch.rand(2, 3000, 96).bfloat16()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(deformable_attention, inputs, grad_output) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -------------------------------------------------------------------------------- errors


def wrong_inputs():
    inputs = make_inputs(dtype=torch.float32)
    return {
        "value": inputs._replace(value=inputs.value[0]),
        "reference": inputs._replace(reference=inputs.reference[..., :1]),
        "reference ": inputs._replace(reference=inputs.reference[:, :4]),
        "offsets": inputs._replace(offsets=inputs.offsets[..., :1]),
        "offsets ": inputs._replace(offsets=inputs.offsets[0]),
        "logits": inputs._replace(logits=inputs.logits[..., :-1]),
        "valid_sizes": inputs._replace(valid_sizes=inputs.valid_sizes[:, :2]),
        "padding": inputs._replace(padding=inputs.padding[:, 1:]),
        "padding ": inputs._replace(padding=inputs.padding.float()),
        "shapes": inputs._replace(shapes=((5, 7), (3, 2), (2, 2))),
    }


@pytest.mark.parametrize("name", wrong_inputs())
def test_errors_say_what_was_expected_and_what_came(deform, name):
    function, device = deform
    inputs = [x.to(device) if isinstance(x, torch.Tensor) else x for x in wrong_inputs()[name]]
    with pytest.raises(ValueError, match=rf"{name.strip()}.*got "):
        function(*inputs)


def test_images_beyond_32_bits_are_refused(deform_device):
    """Offsets inside one image are 32-bit."""
    inputs = make_inputs(1, 1, 1, 8, 1, ((1, 1),), dtype=torch.float32, device=deform_device)
    inputs = inputs._replace(
        value=torch.ones(1, device=deform_device).expand(1, 1 << 28, 1, 8),
        shapes=((1 << 14, 1 << 14),),
        padding=None,
    )
    with pytest.raises(ValueError, match=r"S \* H \* D in \[0, 2\^31\)"):
        deformable_attention(*inputs)


def test_second_derivative_is_refused_in_a_sentence(deform_device):
    inputs = make_inputs(device=deform_device)
    output = deformable_attention(*inputs)
    (gradient,) = torch.autograd.grad(output.sum(), inputs.offsets, create_graph=True)
    with pytest.raises(RuntimeError, match="deformable_attention is not twice differentiable"):
        gradient.sum().backward()


def test_plain_version_is_twice_differentiable():
    inputs = make_inputs(1, 2, 1, 2, 1, ((3, 3),))
    output = deformable_attention_pytorch(*inputs)
    (gradient,) = torch.autograd.grad(output.sum(), inputs.logits, create_graph=True)
    gradient.sum().backward()
    assert inputs.value.grad is not None


# ------------------------------------------------------------------------- instruction sets


def capabilities():
    """What ATEN_CPU_CAPABILITY may be here: it is believed, though the CPU may not know it."""
    names = ["default", "avx2", "avx512"]
    own = torch.backends.cpu.get_cpu_capability().lower()
    return names[: names.index(own) + 1] if own in names else names[:1]


PRINT_DIGEST = """
import sys, torch
sys.path.insert(0, {folder!r})
from deformable_cases import make_inputs, run
from dn_detr.ops import deformable_attention
print(torch.backends.cpu.get_cpu_capability())
for channels in (8, 20, 32, 64):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        inputs = make_inputs(channels=channels, dtype=dtype, offset_dtype=dtype)
        for result in run(deformable_attention, inputs):
            print(*result.double().flatten()[::7].tolist())
"""


@pytest.mark.skipif("cpu" not in KERNELS.get("deformable_attention", ()), reason="no CPU kernels")
def test_all_instruction_sets_give_the_same_result():
    """ATEN_CPU_CAPABILITY chooses them, as for PyTorch's own kernels."""
    code = PRINT_DIGEST.format(folder=str(Path(__file__).parent))
    outputs = []
    for capability in capabilities():
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code]
        text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        outputs.append(text.stdout.splitlines())
    assert not outputs[0][0].startswith("AVX")
    expected = [torch.tensor([float(x) for x in line.split()]) for line in outputs[0][1:]]
    for output in outputs[1:]:
        for line, want in zip(output[1:], expected, strict=True):
            got = torch.tensor([float(x) for x in line.split()])
            torch.testing.assert_close(got, want, rtol=0.01, atol=2e-5)
