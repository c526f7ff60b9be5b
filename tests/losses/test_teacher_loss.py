"""Teacher's boxes as a second set of targets (Teach-DETR, 2211.11953)."""

import math

import pytest
import torch
from random_values import random_mask, random_predictions, random_targets
from torch.testing import assert_close

from dn_detr.build import LossConfig
from dn_detr.losses.matcher import Costs, assign
from dn_detr.losses.teacher_loss import Teach, Teaching
from dn_detr.structures import Predictions, Segment, Target, pad_targets

LN3 = math.log(3)  # a logit whose probability is 0.75
NEAR, FAR = [0.5, 0.5, 0.4, 0.4], [0.9, 0.9, 0.1, 0.1]


def predicted(logits, boxes) -> Predictions:
    """One image: logits [L, Q, K] and boxes [L, Q, 4] of matched queries."""
    logits, boxes = torch.tensor(logits)[:, None], torch.tensor(boxes)[:, None]
    return Predictions(
        logits=logits.requires_grad_(),
        boxes=boxes.requires_grad_(),
        references=(None,) * logits.shape[0],
        segments=(Segment("match", logits.shape[2]),),
    )


def one_box(score: float):
    """Half as high as NEAR, about the same centre: IoU and GIoU are 0.5."""
    boxes, scores = torch.tensor([[0.5, 0.5, 0.4, 0.2]]), torch.tensor([score])
    return pad_targets([Target(torch.tensor([0]), boxes, scores=scores)])


def test_losses_by_hand():
    predictions = predicted([[[LN3], [0.0]]], [[NEAR, FAR]])
    losses = Teaching(Teach(), costs=Costs())(predictions, one_box(0.6), 4.0)
    # Matched: 0.6 x 0.25 x 0.25^2 x -ln 0.75 = 0.002697. Not: 0.5 x 0.75 x 0.5^2 x ln 2 = 0.064982.
    assert losses["loss_ce_teacher"].item() == pytest.approx(2 * 0.0676795 / 4, abs=1e-6)
    assert losses["loss_bbox_teacher"].item() == pytest.approx(5 * 0.6 * 0.2 / 4, abs=1e-6)
    assert losses["loss_giou_teacher"].item() == pytest.approx(2 * 0.6 * (1 - 0.5) / 4, abs=1e-6)
    assert len(losses) == 3


def test_every_weight_multiplies_its_loss():
    predictions = predicted([[[LN3], [0.0]]], [[NEAR, FAR]])
    weights = {"class_weight": 1.0, "l1_weight": 1.0, "giou_weight": 1.0, "unmatched_weight": 0.2}
    losses = Teaching(Teach(weight=0.5, **weights), costs=Costs())(predictions, one_box(0.6), 1.0)
    # 0.2 in place of 0.5 for the slot without box: 0.0259930.
    expected = {"ce": 0.0026970 + 0.0259930, "bbox": 0.6 * 0.2, "giou": 0.6 * 0.5}
    for name, value in expected.items():
        assert losses[f"loss_{name}_teacher"].item() == pytest.approx(0.5 * value, abs=1e-6)


def test_every_layer_has_a_matching_of_its_own():
    """The second layer has exchanged its slots, so that its losses are those of the first."""
    predictions = predicted([[[LN3], [0.0]], [[0.0], [LN3]]], [[NEAR, FAR], [FAR, NEAR]])
    losses = Teaching(Teach(), costs=Costs())(predictions, one_box(0.6), 1.0)
    assert losses["loss_bbox_teacher"].item() == pytest.approx(0.6)
    for name in ("ce", "bbox", "giou"):
        assert_close(losses[f"loss_{name}_teacher"], losses[f"loss_{name}_teacher_0"])


def test_a_sure_teacher_who_sees_the_ground_truth_doubles_its_losses():
    predictions = random_predictions(Segment("match", 6))
    truth = random_targets(3, 0, 5)
    sure = pad_targets(
        [
            Target(truth.labels[i, :n], truth.boxes[i, :n], scores=torch.ones(n).double())
            for i, n in enumerate(truth.counts)
        ]
    )
    teaching = Teaching(Teach(class_weight=1.0, unmatched_weight=1.0), costs=Costs())
    found = teaching(predictions, sure, 8.0)
    expected = LossConfig().criterion()(
        predictions, truth, assign(predictions, truth, Costs()), 8.0
    )
    assert {key.replace("_teacher", ""): value for key, value in found.items()} == expected


def test_images_without_a_teachers_box_only_teach_to_say_less():
    predictions = predicted([[[LN3], [0.0]]], [[NEAR, FAR]])
    nothing = pad_targets([Target(torch.zeros(0).long(), torch.zeros(0, 4), scores=torch.zeros(0))])
    losses = Teaching(Teach(), costs=Costs())(predictions, nothing, 1.0)
    # 2 x 0.5 x 0.75 x (0.75^2 x ln 4 + 0.5^2 x ln 2)
    assert losses["loss_ce_teacher"].item() == pytest.approx(0.7148080, abs=1e-6)
    assert losses["loss_bbox_teacher"] == 0 and losses["loss_giou_teacher"] == 0
    sum(losses.values()).backward()
    assert (predictions.logits.grad > 0).all() and (predictions.boxes.grad == 0).all()


def test_only_matched_queries_are_taught():
    assignment = torch.zeros(3, 4, dtype=torch.int64)
    denoise = Segment("dn", 4, assignment=assignment)
    empty = random_mask(3, 6, probability=0.3)
    match = Segment("match", 6, is_empty=empty)
    proposals = random_predictions(Segment("match", 9), layers=1, seed=5)
    predictions = random_predictions(
        denoise, match, Segment("further", 5, num_groups=1), proposals=proposals
    )
    for values in (predictions.logits, proposals.logits):
        values.requires_grad_()
    losses = Teaching(Teach(), costs=Costs())(
        predictions, random_targets(3, 0, 2, has_scores=True), 5.0
    )
    assert {key.removesuffix("_0") for key in losses} == {
        *("loss_ce_teacher", "loss_bbox_teacher", "loss_giou_teacher")
    }
    sum(losses.values()).backward()
    moved = (predictions.logits.grad != 0).any(-1).any(0)  # [B, Q]
    assert torch.equal(moved[:, 4:10], ~empty)
    assert not moved[:, :4].any() and not moved[:, 10:].any()
    assert proposals.logits.grad is None


def test_groups_that_predict_the_same_are_taught_as_one():
    """The losses of Group DETR are a mean over all groups, those of the teacher too."""
    alone = random_predictions(Segment("match", 6))
    match = Segment("match", 6, weight=1 / 3)
    groups = Segment("group", 12, num_groups=2, positives_per_object=2, weight=2 / 3)
    together = Predictions(
        logits=alone.logits.repeat(1, 1, 3, 1),
        boxes=alone.boxes.repeat(1, 1, 3, 1),
        references=(None, None),
        segments=(match, groups),
    )
    boxes = random_targets(3, 0, 5, has_scores=True)
    expected = Teaching(Teach(), costs=Costs())(alone, boxes, 8.0)
    found = Teaching(Teach(), costs=Costs(), segments=("match", "group"))(together, boxes, 8.0)
    assert len(found) == 2 * len(expected)
    for key, value in expected.items():
        of_groups = found[key.replace("_teacher", "_group_teacher")]
        assert_close(found[key] + of_groups, value)


def test_softmax_weighs_slots_by_both_factors():
    # Probabilities (0.75, 0.25) and (0.5, 0.5), the second is "no object": weights 0.6, 0.1 x 0.5.
    predictions = predicted([[[LN3, 0.0], [0.0, 0.0]]], [[NEAR, FAR]])
    losses = Teaching(Teach(), costs=Costs(kind="softmax"))(predictions, one_box(0.6), 7.0)
    expected = (0.6 * -math.log(0.75) + 0.05 * math.log(2)) / 0.65
    assert losses["loss_ce_teacher"].item() == pytest.approx(2 * expected, abs=1e-6)


def test_losses_are_float32_inside_of_autocast():
    predictions = predicted([[[LN3], [0.0]]], [[NEAR, FAR]])
    outside = Teaching(Teach(), costs=Costs())(predictions, one_box(0.6), 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Teaching(Teach(), costs=Costs())(predictions, one_box(0.6), 1.0)
    assert all(inside[key].dtype == torch.float32 for key in outside)
    assert inside == outside


def test_detectors_without_boxes_cannot_be_taught():
    with pytest.raises(ValueError, match="teach a detector that predicts boxes"):
        Teaching(Teach(), costs=Costs(l1=0, giou=0))
