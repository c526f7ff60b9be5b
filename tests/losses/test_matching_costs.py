import math
from dataclasses import replace

import plain_loops
import pytest
import torch
from random_values import random_predictions, random_targets
from torch.testing import assert_close

from dn_detr.losses.matching_costs import Costs, focal_cost, focal_penalty, list_objects
from dn_detr.structures import Segment

pytestmark = pytest.mark.usefixtures("operators")


def test_objects_are_listed_image_after_image_without_padding():
    targets = random_targets(2, 0, 3, multiple_of=8)
    objects = list_objects(targets)
    assert objects.image_of.tolist() == [0, 0, 2, 2, 2]
    assert_close(objects.boxes, torch.cat((targets.boxes[0, :2], targets.boxes[2, :3])))
    assert_close(objects.labels, torch.cat((targets.labels[0, :2], targets.labels[2, :3])))


def test_costs_agree_with_the_published_formula_for_every_pair_of_an_image():
    targets = random_targets(2, 0, 3)
    predictions = random_predictions(Segment("match", 4))
    objects = list_objects(targets)
    found = Costs()(predictions, objects)
    assert found.shape == (2, 5, 4)
    for layer in range(2):
        for t, image in enumerate(objects.image_of.tolist()):
            for slot in range(4):
                expected = plain_loops.matching_cost(
                    predictions.logits[layer, image, slot].tolist(),
                    predictions.boxes[layer, image, slot].tolist(),
                    objects.labels[t].item(),
                    objects.boxes[t].tolist(),
                )
                assert found[layer, t, slot].item() == pytest.approx(expected, abs=1e-5)


def test_softmax_cost_is_minus_the_probability():
    targets = random_targets(1, 2, 0)
    predictions = random_predictions(Segment("match", 4))
    found = Costs(class_cost=1.0, l1=0.0, giou=0.0, kind="softmax")(
        predictions, list_objects(targets)
    )
    logits = predictions.logits[1, 1, 3].tolist()
    label = targets.labels[1, 1].item()
    expected = -math.exp(logits[label]) / sum(math.exp(logit) for logit in logits)
    assert found[1, 2, 3].item() == pytest.approx(expected, abs=1e-12)


def test_focal_penalty_is_exact_and_smooth_for_logits_of_any_size():
    logits = torch.tensor([-200.0, -30.0, 0.0, 30.0, 200.0], requires_grad=True)
    for gamma in (0.5, 1.5, 2.0):
        penalty = focal_penalty(logits, gamma)
        # p^gamma (-log(1 - p)): p = e^-30 twice, .5, then -log(1 - p) = the logit.
        expected = [0.0, math.exp(-30 * (gamma + 1)), 0.5**gamma * math.log(2), 30.0, 200.0]
        assert_close(penalty, torch.tensor(expected))
        (gradient,) = torch.autograd.grad(penalty.sum(), logits)
        assert gradient.isfinite().all()
    assert focal_penalty(torch.tensor(0.3), 0.0) == pytest.approx(math.log(1 + math.exp(0.3)))


def test_half_precision_predictions_give_float32_costs():
    targets = random_targets(1, 2, 0)
    targets = replace(targets, boxes=targets.boxes.float())
    predictions = random_predictions(Segment("match", 4))
    half = replace(
        predictions, logits=predictions.logits.bfloat16(), boxes=predictions.boxes.bfloat16()
    )
    full = replace(predictions, logits=half.logits.float(), boxes=half.boxes.float())
    for costs in (Costs(), Costs(kind="softmax")):
        found = costs(half, list_objects(targets))
        assert found.dtype == torch.float32
        assert_close(found, costs(full, list_objects(targets)))


def test_one_cost_covers_the_objects_of_its_own_image_only():
    # Garbage in another image must not be touched, let alone enter the result.
    targets = random_targets(2, 1, 0)
    predictions = random_predictions(Segment("match", 4))
    objects = list_objects(targets)
    before = Costs()(predictions, objects)
    predictions.logits[:, 1:] = torch.nan
    predictions.boxes[:, 1:] = torch.nan
    assert_close(Costs()(predictions, objects)[:, :2], before[:, :2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slots", [1, 7, 256, 300, 900])
@pytest.mark.parametrize("costs", [Costs(), Costs(gamma=1.3, alpha=0.6), Costs(kind="softmax")])
def test_costs_have_the_same_values_compiled_and_plain(costs, slots, dtype):
    targets = random_targets(5, 0, 9, 1)
    predictions = random_predictions(Segment("other", 3), Segment("match", slots), batch=4)
    extremes = torch.tensor([0.0, 1e-4, -40.0, 40.0, 200.0], dtype=torch.float64)
    predictions.logits[0, 0, 3 : 3 + slots : 5] = extremes  # one for each class
    predictions.boxes[1, :, ::4, 2:] = 0  # no area
    part = predictions.of("match")  # a view with gaps
    part = replace(part, logits=part.logits.to(dtype), boxes=part.boxes.to(dtype))
    objects = list_objects(replace(targets, boxes=targets.boxes.to(dtype)))
    expected = costs.compute_pytorch(part.logits, part.boxes, objects)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_close(costs(part, objects), expected, rtol=tolerance, atol=tolerance)


def test_costs_of_the_class_alone_need_no_boxes():
    predictions = random_predictions(Segment("match", 4))
    objects = list_objects(random_targets(2, 0, 3))
    costs = Costs(l1=0.0, giou=0.0)
    found = costs(replace(predictions, boxes=None), objects)
    assert_close(found, costs(predictions, objects))


def test_a_batch_without_objects_has_no_costs():
    predictions = random_predictions(Segment("match", 4))
    assert Costs()(predictions, list_objects(random_targets(0, 0, 0))).shape == (2, 0, 4)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match='"focal" or "softmax", got \'hinge\''):
        Costs(kind="hinge")
    predictions = replace(random_predictions(Segment("match", 4)), boxes=None)
    with pytest.raises(ValueError, match="need L1 and GIoU costs of 0"):
        Costs()(predictions, list_objects(random_targets(1, 1, 1)))
    logits, image_of = torch.zeros(1, 1, 2, 3), torch.zeros(1, dtype=torch.int64)
    assert focal_cost(logits, image_of, image_of, 0.25, 2.0).shape == (1, 1, 2)
