"""The matching operators as torch.library sees them, and the errors at their doors."""

import pytest
import torch

from dn_detr.ops.extension import KERNELS
from dn_detr.ops.matching import assign_objects, has_nonfinite, matching_costs

pytestmark = pytest.mark.skipif(not KERNELS, reason="dn_detr._C is not built")

WEIGHTS = {
    "class_cost": 2.0, "l1": 5.0, "giou": 2.0, "is_softmax": False, "alpha": 0.25, "gamma": 2.0,
}  # fmt: skip


def cost_inputs(device="cpu"):
    """logits [2, 3, 5, 4], boxes, image_of [4], labels, object boxes."""
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.rand(2, 2, 3, 5, 4, generator=generator)
    image_of, labels = torch.tensor([[0, 0, 2, 2], [0, 3, 1, 1]])
    inputs = logits, boxes, image_of, labels, torch.rand(4, 4, generator=generator)
    return [x.to(device) for x in inputs]


@pytest.fixture(params=["cpu"] + ["cuda"] * torch.cuda.is_available())
def device(request):
    if request.param not in KERNELS["assign_objects"]:
        pytest.skip(f"no kernels for {request.param}")
    return request.param


def test_opcheck(device):
    operators = torch.ops.dn_detr
    costs = cost_inputs(device)
    for is_softmax in (False, True):
        weights = {**WEIGHTS, "is_softmax": is_softmax}.values()
        torch.library.opcheck(operators.matching_costs.default, (*costs, *weights))
    cost = operators.matching_costs(*costs, *WEIGHTS.values())
    is_empty = torch.rand(3, 5, device=device) < 0.5
    segments = ([cost, cost[..., :4]], costs[2], 3, [is_empty, None], [1, 2], [1, 2])
    torch.library.opcheck(operators.assign_objects.default, segments)
    for empty in (is_empty, None):
        torch.library.opcheck(operators.has_nonfinite.default, (costs[0], empty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_is_found_wherever_it_stands(device, value, dtype):
    slots, width = 7, 83
    is_empty = torch.zeros(3, slots, dtype=torch.bool, device=device)
    is_empty[1, 4] = True
    everything = torch.rand(2, 3, slots + 4, width, device=device).to(dtype)
    largest = torch.finfo(dtype).max
    everything[..., 0], everything[..., -1] = largest, -largest  # whose sum overflows
    values = everything[:, :, 2 : 2 + slots]  # a view with gaps
    everything[:, :, 1] = everything[:, :, 2 + slots] = value  # beside it
    assert not has_nonfinite(values, is_empty).any()
    for place in [(0, 0, 0, 0), (1, 2, slots - 1, width - 1), (0, 1, 3, 82), (1, 1, 4, 50)]:
        before = values[place].item()
        values[place] = value
        expected = torch.zeros(2, 3, dtype=torch.bool, device=device)
        expected[place[:2]] = True
        assert torch.equal(has_nonfinite(values, None), expected), place
        expected[place[:2]] = not is_empty[place[1:3]]
        assert torch.equal(has_nonfinite(values, is_empty), expected), place
        values[place] = before


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x[0], r"logits to be \[L, B, Q, K\], got \[3, 5, 4\]"),
        (0, lambda x: x.half(), "logits to be"),
        (1, lambda x: x[..., :3], r"boxes to be \[2, 3, 5, 4\], got \[2, 3, 5, 3\]"),
        (1, lambda x: x.double(), "boxes to be"),
        (2, lambda x: x[:3], r"labels to be \[3\], got \[4\]"),
        (2, lambda x: x.int(), "image_of to be"),
        (2, lambda x: x.flip(0), "image_of to ascend .* got 0 at 2"),
        (2, lambda x: x + 1, r"within \[0, 3\), got 3 at"),
        (3, lambda x: x + 1, r"labels in \[0, 4\), got 4"),
        (4, lambda x: x[:, :2], r"object_boxes to be \[4, 4\], got \[4, 2\]"),
    ],
)
def test_wrong_inputs_of_the_costs_are_named(place, change, message):
    inputs = cost_inputs()
    inputs[place] = change(inputs[place])
    with pytest.raises(ValueError, match=message):
        matching_costs(*inputs, **WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"costs": [torch.zeros(2, 3, 6)]}, r"costs to be \[2, 2, 6\], got \[2, 3, 6\]"),
        ({"costs": [torch.zeros(2, 6)]}, r"costs to be \[L, T, slots\], got \[2, 6\]"),
        ({"costs": [torch.zeros(2, 2, 6).half()]}, "costs to be"),
        ({"image_of": torch.tensor([1, 0])}, "image_of to ascend"),
        ({"num_groups": [4]}, "num_groups to divide 6 slots, got 1 and 4"),
        ({"matches_per_object": [0]}, "matches_per_object > 0 .* got 0 and 1"),
        ({"matches_per_object": [1, 1]}, "for each of 1 segments, got 1, 1 and 2"),
        ({"is_empty": [torch.zeros(1, 6).bool()]}, r"is_empty to be \[2, 6\], got \[1, 6\]"),
    ],
)
def test_wrong_inputs_of_the_assignment_are_named(changes, message):
    arguments = {
        "costs": [torch.zeros(2, 2, 6)], "image_of": torch.tensor([0, 1]), "batch": 2,
        "is_empty": [None], "num_groups": [1], "matches_per_object": [1],
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        assign_objects(**{**arguments, **changes})
