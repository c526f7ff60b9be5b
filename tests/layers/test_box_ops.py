import pytest
import torch
from torch.testing import assert_close

from dn_detr.layers.box_ops import (
    cxcywh_to_xyxy,
    elementwise_generalized_iou,
    elementwise_iou,
    inverse_sigmoid,
    keep_inside,
    xyxy_to_cxcywh,
)


def random_boxes_xyxy(*shape, seed=0):
    centre, size = torch.rand(2, *shape, 2, generator=torch.manual_seed(seed), dtype=torch.float64)
    return torch.cat((centre - size / 2, centre + size / 2), dim=-1)


def giou_of_one_pair(a, b):
    """(iou, generalized iou) of two boxes given as lists of four floats."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union, width * height / union - (hull - union) / hull


def test_inverse_sigmoid_inverts_sigmoid_and_is_bounded_at_the_ends():
    logits = torch.linspace(-6, 6, 25, dtype=torch.float64)
    assert_close(inverse_sigmoid(logits.sigmoid(), 1e-3), logits)
    ends = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]), 1e-3)
    assert_close(ends, torch.tensor([-6.9077554, -6.9077554, 6.9077554, 6.9077554]))


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5])
def test_inverse_sigmoid_and_its_gradient_are_those_of_the_published_formula(epsilon):
    x = torch.linspace(0, 1, 5001, dtype=torch.float64, requires_grad=True)
    published = torch.log(x.clamp(min=epsilon) / (1 - x).clamp(min=epsilon))
    (expected,) = torch.autograd.grad(published.sum(), x)
    found = inverse_sigmoid(x, epsilon)
    assert_close(found, published, rtol=0, atol=1e-14)
    assert_close(torch.autograd.grad(found.sum(), x)[0], expected)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5])
def test_given_boxes_are_bounded_as_the_published_code_does_by_their_logits(epsilon):
    x = torch.linspace(-0.1, 1.1, 1001, dtype=torch.float64)
    published = torch.log(x.clamp(0, 1).clamp(min=epsilon) / (1 - x.clamp(0, 1)).clamp(min=epsilon))
    assert_close(keep_inside(x, epsilon), published.sigmoid(), rtol=0, atol=1e-14)
    logits = inverse_sigmoid(keep_inside(torch.tensor([0.0, 1.0]), 1e-3), 1e-3)
    assert logits.isfinite().all()


def test_boxes_are_computed_in_float32_from_half_precision():
    half = torch.tensor([0.25, 0.5, 0.125, 0.75], dtype=torch.bfloat16)
    for function in (cxcywh_to_xyxy, xyxy_to_cxcywh, lambda x: inverse_sigmoid(x, 1e-3)):
        assert function(half).dtype == torch.float32
        assert function(half.double()).dtype == torch.float64
    assert elementwise_generalized_iou(half, half).dtype == torch.float32


def test_centre_form_and_corner_form_by_hand_and_round_trip():
    assert_close(
        cxcywh_to_xyxy(torch.tensor([[0.5, 0.4, 0.2, 0.6]])), torch.tensor([[0.4, 0.1, 0.6, 0.7]])
    )
    corners = random_boxes_xyxy(5, 3)
    assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(corners)), corners)


def test_pairs_by_hand():
    # Unit squares shifted by half their width: overlap 0.5, union 1.5, hull 1.5.
    # Unit squares two apart: no overlap, union 2, hull 3.
    square = torch.tensor([0.0, 0.0, 1.0, 1.0])
    others = torch.tensor([[0.5, 0.0, 1.5, 1.0], [2.0, 0.0, 3.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    assert_close(elementwise_iou(square, others), torch.tensor([1 / 3, 0.0, 1.0]))
    assert_close(elementwise_generalized_iou(square, others), torch.tensor([1 / 3, -1 / 3, 1.0]))


def test_broadcasting_compares_every_pair_as_a_loop_does():
    a, b = random_boxes_xyxy(2, 4, seed=1), random_boxes_xyxy(2, 3, seed=2)
    found = elementwise_generalized_iou(a[:, :, None], b[:, None])
    assert found.shape == (2, 4, 3)
    for image in range(2):
        for i in range(4):
            for j in range(3):
                pair = a[image, i].tolist(), b[image, j].tolist()
                iou, giou = giou_of_one_pair(*pair)
                assert found[image, i, j].item() == pytest.approx(giou, abs=1e-12)
                single = elementwise_iou(a[image, i], b[image, j])
                assert single.item() == pytest.approx(iou, abs=1e-12)


DEGENERATE = {
    "one point twice": ([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], 0.0),
    "line in a box": ([0.5, 0.2, 0.5, 0.8], [0.0, 0.0, 1.0, 1.0], 0.0),
    "two points apart": ([0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], -1.0),
    "crossed corners": ([0.8, 0.8, 0.2, 0.2], [0.0, 0.0, 1.0, 1.0], 0.0),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_boxes_have_finite_values_and_gradients(case):
    a, b, expected = DEGENERATE[case]
    a = torch.tensor(a, requires_grad=True)
    b = torch.tensor(b, requires_grad=True)
    value = elementwise_generalized_iou(a, b)
    assert value.item() == pytest.approx(expected)
    (value + elementwise_iou(a, b)).backward()
    assert a.grad.isfinite().all() and b.grad.isfinite().all()


def test_generalized_iou_gradient_agrees_with_finite_differences():
    a = random_boxes_xyxy(6, seed=3).requires_grad_()
    b = random_boxes_xyxy(6, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(elementwise_generalized_iou, (a, b))
    assert torch.autograd.gradcheck(elementwise_iou, (a, b))


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5])
def test_inverse_sigmoid_is_the_published_formula_in_float32_too(epsilon):
    """Equal bits: the same operations on the same numbers."""
    x = torch.linspace(0, 1, 400_001)
    published = torch.log(x.clamp(min=epsilon) / (1 - x).clamp(min=epsilon))
    assert torch.equal(inverse_sigmoid(x, epsilon), published)
