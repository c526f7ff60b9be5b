"""Deformable attention: the definition, gradients, precision and the traps of boundaries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import BORDER, SHAPES, by_grid_sample, by_loops, make_inputs, run

from dn_detr.ops import ms_deform_attn, ms_deform_attn_pytorch
from dn_detr.ops.extension import KERNELS

NAMES = ("output", "grad_value", "grad_locations", "grad_weights")


def assert_close(results, expected, **tolerance):
    for name, got, want in zip(NAMES, results, expected, strict=True):
        torch.testing.assert_close(
            got.cpu().double(), want.cpu().double(), msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def one_sample(device, x, y, shape, dtype=torch.float64):
    """One head, level and point, one channel; value k + 1 at cell k; (x, y) in cells."""
    height, width = shape
    value = torch.arange(1, height * width + 1, dtype=dtype, device=device).view(1, -1, 1, 1)
    location = torch.tensor([(x + 0.5) / width, (y + 0.5) / height], dtype=dtype, device=device)
    weights = torch.ones(1, 1, 1, 1, 1, dtype=dtype, device=device)
    location = location.view(1, 1, 1, 1, 1, 2)
    return tuple(
        t.requires_grad_() if isinstance(t, torch.Tensor) else t
        for t in (value, (shape,), location, weights)
    )


# ---------------------------------------------------------------------------- definition


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 33])
def test_output_equals_plain_loops(attend, channels):
    function, device = attend
    inputs = make_inputs(channels=channels, device=device)
    expected = by_loops(inputs[0], SHAPES, inputs[2], inputs[3])
    torch.testing.assert_close(function(*inputs).cpu(), expected)


@pytest.mark.parametrize("channels", [1, 4, 16, 20, 32, 64, 100, 256])
def test_output_and_gradients_equal_grid_sample(attend, channels):
    function, device = attend
    expected = run(by_grid_sample, make_inputs(channels=channels))
    results = run(function, make_inputs(channels=channels, device=device))
    assert_close(results, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("points", [1, 3, 17])
@pytest.mark.parametrize(
    "shapes", [((4, 4),), ((1, 9), (9, 1)), ((8, 8), (4, 4), (2, 2), (1, 1), (3, 5))]
)
def test_any_number_of_levels_and_points(attend, shapes, points):
    function, device = attend
    sizes = {"shapes": shapes, "points": points, "channels": 8}
    assert_close(
        run(function, make_inputs(**sizes, device=device)),
        run(by_grid_sample, make_inputs(**sizes)),
        rtol=1e-9,
        atol=1e-9,
    )


def test_gradients_equal_finite_differences(attend):
    function, device = attend
    # Away from whole cells, where the gradient of a location jumps.
    value, shapes, locations, weights = make_inputs(1, 2, 2, 3, 2, ((3, 4), (2, 2)), device=device)
    with torch.no_grad():
        sides = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64, device=device)
        cells = locations * sides[:, None] - 0.5
        cells = cells.floor() + 0.2 + 0.6 * (cells - cells.floor())
        locations = ((cells + 0.5) / sides[:, None]).requires_grad_()
    # On a GPU sums come in any order: two backwards may differ in the last bit.
    torch.autograd.gradcheck(
        lambda v, x, w: function(v, shapes, x, w), (value, locations, weights),
        nondet_tol=0 if value.is_cpu else 1e-12,
    )  # fmt: skip


def test_many_queries_are_all_computed(attend):
    """More rows than one thread or block of threads takes."""
    function, device = attend
    sizes = {"queries": 1003, "heads": 2, "channels": 8, "batch": 3, "dtype": torch.float32}
    assert_close(
        run(function, make_inputs(**sizes, device=device)),
        run(by_grid_sample, make_inputs(**{**sizes, "dtype": torch.float64})),
        rtol=1e-4,
        atol=2e-4,
    )


# ----------------------------------------------------------------------------- precision


@pytest.mark.parametrize("channels", [5, 8, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_pytorch(attend, dtype, channels):
    """Against float64 on the same rounded inputs; plain: `grid_sample` with all in that dtype."""
    function, device = attend
    inputs = make_inputs(channels=channels, queries=50, dtype=dtype, device=device)
    precise = [x.detach().double().cpu().requires_grad_() for x in (inputs[0], *inputs[2:])]
    truth = run(by_grid_sample, (precise[0], SHAPES, *precise[1:]))
    rounded = [x.detach().to(dtype).requires_grad_() for x in precise]
    plain = run(by_grid_sample, (rounded[0], SHAPES, *rounded[1:]))
    for name, got, other, want in zip(NAMES, run(function, inputs), plain, truth, strict=True):
        error = (got.double().cpu() - want).abs().mean()
        allowed = (other.double() - want).abs().mean()
        assert error <= 2 * allowed + 1e-7, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_result_and_gradients_have_the_types_of_their_inputs(attend, dtype):
    function, device = attend
    inputs = make_inputs(dtype=dtype, device=device)
    output, *gradients = run(function, inputs)
    assert output.dtype == dtype
    assert [g.dtype for g in gradients] == [inputs[0].dtype, inputs[2].dtype, inputs[3].dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_values_are_summed_in_single_precision(attend, dtype):
    """4096 samples of 1 with weight 1: half precision sums would stop at 256 or 2048."""
    function, device = attend
    value = torch.ones(1, 1, 1, 8, dtype=dtype, device=device)
    locations = torch.full((1, 1, 1, 1, 4096, 2), 0.5, device=device)
    weights = torch.ones(1, 1, 1, 1, 4096, device=device)
    assert (function(value, ((1, 1),), locations, weights) == 4096).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients_of_values_are_summed_in_single_precision(attend, dtype):
    function, device = attend
    value = torch.ones(1, 1, 1, 8, dtype=dtype, device=device, requires_grad=True)
    locations = torch.full((1, 4096, 1, 1, 1, 2), 0.5, device=device)
    weights = torch.ones(1, 4096, 1, 1, 1, device=device)
    function(value, ((1, 1),), locations, weights).backward(
        torch.ones(1, 4096, 8, dtype=dtype, device=device)
    )
    assert (value.grad == 4096).all()


def test_autocast_does_not_touch_the_locations(attend):
    """Rounded to bfloat16, locations would be off by half a cell at this width."""
    function, device = attend
    value, shapes, locations, weights = make_inputs(
        shapes=((2, 400),), channels=8, dtype=torch.float32, device=device, reach=0
    )
    expected = function(value, shapes, locations, weights)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(function(value, shapes, locations, weights), expected)
        half = function(value.bfloat16(), shapes, locations, weights)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.03)


# ---------------------------------------------------------------------------- boundaries


@pytest.mark.parametrize(("x", "y", "output", "grad_x"), BORDER)
def test_values_and_gradients_at_the_border(attend, x, y, output, grad_x):
    function, device = attend
    # A power of two wide and high: the locations are exact.
    inputs = one_sample(device, x, y, (2, 4))
    result, _, grad_location, _ = run(function, inputs, torch.ones(1, 1, 1))
    assert result.item() == output
    assert grad_location[..., 0].item() / 4 == grad_x


BAD = [float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 3e9, -3e9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("coordinate", [0, 1])
def test_impossible_locations_contribute_nothing(attend, bad, coordinate, dtype):
    function, device = attend
    value, shapes, locations, weights = make_inputs(dtype=dtype, device=device, channels=8)
    with torch.no_grad():
        locations[:, 1, :, :, 2, coordinate] = bad
        without = weights.clone()
        without[:, 1, :, :, 2] = 0
        inside = torch.nan_to_num(locations, nan=0.5, posinf=0.5, neginf=0.5).clamp(-0.3, 1.3)
    results = run(function, (value, shapes, locations, weights))
    expected = run(function, (value, shapes, inside.requires_grad_(), without.requires_grad_()))
    torch.testing.assert_close(results[0], expected[0])
    torch.testing.assert_close(results[1], expected[1])
    assert all(torch.isfinite(r).all() for r in results)
    assert (results[2][:, 1, :, :, 2] == 0).all() and (results[3][:, 1, :, :, 2] == 0).all()


def test_nan_next_door_is_not_multiplied_by_zero(attend):
    """Corners outside of the map must not be read in clamped form: another cell may hold NaN."""
    function, device = attend
    value, shapes, locations, weights = one_sample(device, -0.25, 0.0, (2, 4))
    with torch.no_grad():
        value[:, [1, 2, 3, 5, 6, 7]] = float("nan")
    results = run(function, (value, shapes, locations, weights), torch.ones(1, 1, 1))
    assert results[0].item() == 0.75
    assert all(torch.isfinite(r).all() for r in results)


def test_levels_do_not_leak_into_each_other(attend):
    """Beyond the last row of a level lies the first row of the next one in memory."""
    function, device = attend
    value, shapes, locations, weights = make_inputs(
        shapes=((2, 2), (2, 2)), points=1, device=device, channels=8
    )
    with torch.no_grad():
        locations[..., 0, :, 1] = 1.2  # level 0: partly below its last row
        value[:, 4:] = float("nan")
        weights[..., 1, :] = 0
        locations[..., 1, :, :] = 5
    results = run(function, (value, shapes, locations, weights))
    assert all(torch.isfinite(r).all() for r in results)


# -------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"points": 0}, {"heads": 0}])
def test_empty_inputs_give_empty_or_zero_results(attend, sizes):
    function, device = attend
    inputs = make_inputs(**sizes, channels=8, device=device)
    output, grad_value, grad_locations, grad_weights = run(function, inputs)
    assert output.shape == (inputs[0].shape[0], inputs[2].shape[1], inputs[0].shape[2] * 8)
    assert (output == 0).all() and (grad_value == 0).all()
    assert grad_locations.shape == inputs[2].shape and grad_weights.shape == inputs[3].shape


def test_level_without_cells_contributes_nothing(attend):
    function, device = attend
    inputs = make_inputs(shapes=((3, 4), (0, 5), (2, 2)), channels=8, device=device)
    value, shapes, locations, weights = inputs
    keep = [0, 2]
    expected = function(value, ((3, 4), (2, 2)), locations[:, :, :, keep], weights[:, :, :, keep])
    output, _, grad_locations, grad_weights = run(function, inputs)
    torch.testing.assert_close(output, expected)
    assert (grad_locations[:, :, :, 1] == 0).all() and (grad_weights[:, :, :, 1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_layout_does_not_matter(attend, dtype):
    """Sliced heads, transposed queries, an odd storage offset."""
    function, device = attend
    value, shapes, locations, weights = make_inputs(channels=8, dtype=dtype, device=device)
    expected = run(function, (value, shapes, locations, weights))
    with torch.no_grad():
        strided = torch.cat((value, value), dim=2)[:, :, : value.shape[2]]
        shifted = torch.empty(value.numel() + 1, dtype=dtype, device=device)[1:].view_as(value)
        shifted.copy_(value)
        turned = locations.transpose(0, 1).contiguous().transpose(0, 1)
        spread = torch.stack((weights, weights), dim=-1)[..., 0]
    for other in (strided, shifted):
        inputs = [x.requires_grad_() for x in (other, turned, spread)]
        results = run(function, (inputs[0], shapes, *inputs[1:]))
        assert_close(results, expected, rtol=1e-5, atol=1e-5)


def test_expanded_output_gradient(attend):
    """`sum().backward()` hands down a gradient with strides of zero."""
    function, device = attend
    inputs = make_inputs(device=device, channels=8)
    expected = run(function, inputs, torch.ones(2, 5, 24))
    output = function(*inputs)
    gradients = torch.autograd.grad(output.sum(), (inputs[0], inputs[2], inputs[3]))
    for got, want in zip(gradients, expected[1:], strict=True):
        torch.testing.assert_close(got, want)


def test_only_needed_gradients_may_be_asked_for(attend):
    function, device = attend
    value, shapes, locations, weights = make_inputs(device=device)
    expected = run(function, (value, shapes, locations, weights), torch.ones(2, 5, 12))
    output = function(value, shapes, locations.detach(), weights.detach())
    torch.testing.assert_close(torch.autograd.grad(output.sum(), value)[0], expected[1])


# --------------------------------------------------------------------------- determinism


def test_cpu_result_is_the_same_for_any_number_of_threads():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            inputs = make_inputs(queries=101, channels=32, dtype=torch.float32)
            results.append(run(ms_deform_attn, inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_is_reproducible_where_asked_for(kernel_device, dtype):
    # Many samples on few cells: the order of additions would show.
    inputs = make_inputs(
        queries=3000, shapes=((2, 2),), channels=32, dtype=dtype, device=kernel_device
    )
    grad_output = torch.rand(2, 3000, 96).bfloat16()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(ms_deform_attn, inputs, grad_output) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    precise = [x.detach().double().cpu().requires_grad_() for x in (inputs[0], *inputs[2:])]
    truth = run(by_grid_sample, (precise[0], inputs[1], *precise[1:]), grad_output)
    error = (first[1].double().cpu() - truth[1]).abs() / truth[1].abs().max()
    assert error.max() < (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)


# -------------------------------------------------------------------------------- errors


def wrong_inputs():
    value, shapes, locations, weights = make_inputs(dtype=torch.float32)
    return {
        "value": (value[0], shapes, locations, weights),
        "sampling_locations": (value, shapes, locations[..., :1], weights),
        "attention_weights": (value, shapes, locations, weights[..., :1]),
        "spatial_shapes": (value, ((5, 7), (3, 2), (2, 2)), locations, weights),
        "sampling_locations ": (value.bfloat16(), shapes, locations.bfloat16(), weights),
        "attention_weights ": (value, shapes, locations, weights.double()),
    }


@pytest.mark.parametrize("name", wrong_inputs())
def test_errors_say_what_was_expected_and_what_came(attend, name):
    function, device = attend
    inputs = [x.to(device) if isinstance(x, torch.Tensor) else x for x in wrong_inputs()[name]]
    with pytest.raises(ValueError, match=rf"{name.strip()}.*got "):
        function(*inputs)


def test_second_derivative_is_refused_in_a_sentence(kernel_device):
    inputs = make_inputs(device=kernel_device)
    output = ms_deform_attn(*inputs)
    (gradient,) = torch.autograd.grad(output.sum(), inputs[2], create_graph=True)
    with pytest.raises(RuntimeError, match="ms_deform_attn is not twice differentiable"):
        gradient.sum().backward()


def test_plain_version_is_twice_differentiable():
    inputs = make_inputs(1, 2, 1, 2, 1, ((3, 3),), reach=-0.1)
    output = ms_deform_attn_pytorch(*inputs)
    (gradient,) = torch.autograd.grad(output.sum(), inputs[3], create_graph=True)
    gradient.sum().backward()
    assert inputs[0].grad.abs().sum() > 0


# ------------------------------------------------------------------------- instruction sets


def capabilities():
    """What ATEN_CPU_CAPABILITY may be here: it is believed, though the CPU may not know it."""
    names = ["default", "avx2", "avx512"]
    own = torch.backends.cpu.get_cpu_capability().lower()
    return names[: names.index(own) + 1] if own in names else names[:1]


PRINT_DIGEST = """
import sys, torch
sys.path.insert(0, {folder!r})
from attention_cases import make_inputs, run
from dn_detr.ops import ms_deform_attn
print(torch.backends.cpu.get_cpu_capability())
for channels in (8, 20, 32, 64):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for result in run(ms_deform_attn, make_inputs(channels=channels, dtype=dtype)):
            print(*result.double().flatten()[::7].tolist())
"""


@pytest.mark.skipif("cpu" not in KERNELS.get("ms_deform_attn", ()), reason="no CPU kernels")
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
