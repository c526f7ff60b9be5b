"""Sizes that overflow when multiplied, and counts beyond all memory, are refused in a sentence."""

import pytest
import torch
from deformable_cases import make_inputs, run
from fuzz_operators import run as fuzz
from torch._subclasses.fake_tensor import FakeTensorMode

from dn_detr import ops
from dn_detr.losses.linear_assignment import solve_pytorch
from dn_detr.ops.extension import KERNELS
from dn_detr.ops.matching import assign_objects, has_nonfinite, matching_costs

needs_kernels = pytest.mark.skipif(not KERNELS, reason="dn_detr._C is not built")
SHAPES = ((4, 1 << 62), (1 << 32, 1 << 32), (-1, -35), (1 << 40, 0), (5, -7))


def noise_arguments(device="cpu"):
    return {
        "labels": torch.zeros(2, 3, dtype=torch.int64, device=device),
        "boxes": torch.rand(2, 3, 4, device=device),
        "is_object": torch.ones(2, 3, dtype=torch.bool, device=device),
        "noise_seeds": torch.arange(2, device=device),
        "num_groups": 2,
        "slots_per_group": 3,
        "num_classes": 7,
        "box_noise": 0.4,
        "label_noise": 0.5,
        "contrastive": True,
        "num_matched": 4,
        "mask_dtype": torch.float32,
    }


ABSURD_NOISE = [
    ({"num_groups": 1 << 62}, r"num_groups"),
    ({"num_groups": 1 << 62, "slots_per_group": 0}, r"num_groups"),  # never came back
    ({"num_groups": -1}, r"num_groups .* \[-1"),
    ({"num_matched": (1 << 63) - 1}, r"num_matched .* \[9223372036854775807\]"),
    ({"num_matched": -1}, r"num_matched .* \[-1\]"),
    ({"num_classes": 1 << 40}, r"num_classes in \[0, 2\^31\), got \[1099511627776\]"),
    ({"num_classes": 0}, r"num_classes .* got 0"),
    ({"box_noise": float("nan")}, r"finite, got nan"),
    ({"label_noise": float("inf")}, r"finite, got .* and inf"),
    ({"mask_dtype": torch.int64}, r"mask_dtype .*floating point type, got "),
]


@pytest.mark.parametrize(("changes", "message"), ABSURD_NOISE)
def test_noise_for_absurd_counts(noise, changes, message):
    function, device = noise
    with pytest.raises(ValueError, match=message):
        function(**{**noise_arguments(device), **changes})


@needs_kernels
@pytest.mark.parametrize(("changes", "message"), ABSURD_NOISE)
def test_fake_noise_for_absurd_counts(changes, message):
    with FakeTensorMode(), pytest.raises(ValueError, match=message):
        ops.noise_objects(**{**noise_arguments(), **changes})


ABSURD_ASSIGNMENT = [
    ({"matches_per_object": [1 << 62]}, r"T \* matches_per_object .* \[2, 4611686018427387904\]"),
    ({"matches_per_object": [-1]}, "matches_per_object > 0 .* got -1 and 1"),
    ({"batch": 1 << 62}, "at most 65535 .*images, got .*4611686018427387904"),
    ({"batch": -2}, "images, got .*-2"),
    ({"num_groups": [-(1 << 63)]}, "num_groups to divide 6 slots"),
]


def assignment_arguments():
    return {
        "costs": [torch.rand(2, 2, 6)], "image_of": torch.tensor([0, 1]), "batch": 2,
        "is_empty": [None], "num_groups": [1], "matches_per_object": [1],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["kernel", "pytorch", "fake"])
@pytest.mark.parametrize(("changes", "message"), ABSURD_ASSIGNMENT)
def test_assignment_for_absurd_counts(kind, changes, message):
    if kind != "pytorch" and not KERNELS:
        pytest.skip("dn_detr._C is not built")
    function = solve_pytorch if kind == "pytorch" else assign_objects
    with pytest.raises(ValueError, match=message):
        if kind == "fake":
            with FakeTensorMode():
                function(**{**assignment_arguments(), **changes})
        function(**{**assignment_arguments(), **changes})


@needs_kernels
@pytest.mark.parametrize("function", [assign_objects, solve_pytorch])
def test_more_matches_than_slots_have_no_effect(function):
    """They took memory for each copy of an object."""
    arguments = assignment_arguments()
    expected, _ = function(**{**arguments, "matches_per_object": [6]})
    result, _ = function(**{**arguments, "matches_per_object": [1 << 28]})
    assert (expected[0] >= -1).all() and torch.equal(result[0], expected[0])
    assert (result[0][0, 0] == 0).all()  # the only object of the image takes all slots


@needs_kernels
def test_costs_and_values_of_more_images_than_memory_are_refused():
    none = torch.zeros(0, 1 << 40, 5, 4)
    no_objects = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="at most 65535 .* images, got 0 and 1099511627776"):
        matching_costs(
            none, none, no_objects, no_objects, torch.zeros(0, 4), class_cost=2, l1=5, giou=2,
            is_softmax=False, alpha=0.25, gamma=2,
        )  # fmt: skip
    with pytest.raises(ValueError, match="at most 65535 .* images, got 0 and 1099511627776"):
        has_nonfinite(none, None)


@needs_kernels
@pytest.mark.parametrize("shape", [(3, 1, 0, 1 << 62), (2, 0, 5, 1 << 40)])
def test_no_values_with_absurd_strides_are_finite(shape):
    """Their offsets overflowed, which only `make sanitize` sees."""
    result = has_nonfinite(torch.zeros(shape), None)
    assert result.shape == shape[:2] and not result.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_levels_whose_number_of_cells_overflows(deform, shape):
    """35 cells, as the value has, if products are taken modulo 2^64."""
    function, device = deform
    inputs = make_inputs(shapes=((5, 7),), dtype=torch.float32, device=device, is_padded=False)
    for shapes in ((shape,), ((5, 7), shape)):
        with pytest.raises(ValueError, match="h \\* w of spatial_shapes .*got|offsets must"):
            function(*inputs._replace(shapes=shapes))


@pytest.mark.parametrize("shape", SHAPES)
def test_levels_of_given_samples_whose_number_of_cells_overflows(attend, shape):
    function, device = attend
    value = torch.rand(1, 35, 2, 8, device=device)
    locations = torch.rand(1, 3, 2, 2, 4, 2, device=device)
    with pytest.raises(ValueError, match="h \\* w of spatial_shapes .*got"):
        function(value, ((5, 7), shape), locations, locations[..., 0])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"queries": 1 << 40}, r"Q \* H in \[0, 2\^26\), got \[1099511627776, 2\]"),
        ({"points": 1 << 31}, r"levels \* P \* P in \[0, 2\^31\)"),
        ({"channels": 1 << 40}, r"S \* H \* D in \[0, 2\^31\)"),
    ],
)
def test_absurd_sizes_of_no_images(attend, sizes, message):
    """Empty tensors may have any other size."""
    function, device = attend
    z = {"queries": 3, "channels": 8, "points": 4} | sizes
    value = torch.zeros(0, 35, 2, z["channels"], device=device)
    locations = torch.zeros(0, z["queries"], 2, 1, z["points"], 2, device=device)
    with pytest.raises(ValueError, match=message):
        function(value, ((5, 7),), locations, locations[..., 0])


@pytest.mark.parametrize("coordinates", [2, 4])
def test_no_points_give_zero_and_no_nan_gradient(deform, coordinates):
    function, device = deform
    inputs = make_inputs(points=0, coordinates=coordinates, device=device)
    for result in run(function, inputs):
        assert (result == 0).all()


@needs_kernels
def test_random_calls_equal_the_reference_or_are_refused():
    _, failures = fuzz(trials=150, seed=1)
    assert not failures, failures[0]
