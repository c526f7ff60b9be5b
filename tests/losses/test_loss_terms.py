import math
from dataclasses import replace

import plain_loops
import pytest
import torch
from random_values import random_mask, random_predictions, random_targets
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.testing import assert_close

from dn_detr.build import LossConfig
from dn_detr.losses.criterion import gather_targets
from dn_detr.losses.loss_terms import L1, Focal, GIoU, MatchabilityAware, Softmax
from dn_detr.structures import Assignment, Matched, Segment

TERMS = {
    "focal": Focal(),
    "mal": MatchabilityAware(),
    "softmax": Softmax(),
    "l1": L1(),
    "giou": GIoU(),
}


def random_matched(seed=0, has_scores=False, positives_per_object=2.0):
    """Two layers, three images, six slots; some empty, some with an object of their image."""
    targets = random_targets(3, 2, 1, seed=seed, has_scores=has_scores)
    segment = Segment("match", 6, positives_per_object=positives_per_object)
    is_real = ~random_mask(3, 6, probability=0.3)
    object_of = torch.full((2, 3, 6), -1)
    for image, count in enumerate(targets.counts):
        slots = is_real[image].nonzero()[:, 0]
        count = min(count, slots.numel())
        object_of[0, image, slots[:count]] = torch.arange(count)
        object_of[1, image, slots[-count:]] = torch.arange(count)
    return gather_targets(random_predictions(segment), targets, [Assignment(object_of, is_real)])


def one_slot(logits, box, label=None, target_box=(0.5, 0.5, 0.2, 0.2), score=1.0):
    """One layer, image and slot, with an object if there is a label."""
    is_positive = label is not None
    return Matched(
        logits=torch.tensor(logits).view(1, 1, 1, -1),
        boxes=torch.tensor(box).view(1, 1, 1, 4),
        labels=torch.tensor([[[label if is_positive else 0]]]),
        target_boxes=torch.tensor(target_box).view(1, 1, 1, 4),
        target_scores=torch.full((1, 1, 1), score),
        is_positive=torch.tensor([[[is_positive]]]),
        is_real=torch.ones(1, 1, 1, dtype=torch.bool),
        sizes=(1,),
        positives_per_object=torch.ones(1),
    )


def test_focal_agrees_with_a_loop_over_slots_and_classes():
    matched = random_matched()
    expected = [0.0, 0.0]
    for layer, image, slot in matched.is_real.nonzero().tolist():
        for k, logit in enumerate(matched.logits[layer, image, slot].tolist()):
            is_target = bool(matched.is_positive[layer, image, slot])
            is_target &= matched.labels[layer, image, slot].item() == k
            expected[layer] += plain_loops.focal_loss(logit, is_target, 0.3, 1.7) / (2.0 * 4.0)
    found = Focal(alpha=0.3, gamma=1.7)(matched, 4.0)
    assert_close(found[:, 0], torch.tensor(expected, dtype=torch.float64))


def test_focal_with_gamma_zero_is_cross_entropy():
    matched = random_matched()
    answer = torch.zeros_like(matched.logits)
    for layer, image, slot in matched.is_positive.nonzero().tolist():
        answer[layer, image, slot, matched.labels[layer, image, slot]] = 1
    loss = binary_cross_entropy_with_logits(matched.logits, answer, reduction="none").sum(-1)
    expected = torch.stack([loss[i][matched.is_real[i]].sum() for i in range(2)]) / (2 * 5)
    assert_close(2 * Focal(alpha=0.5, gamma=0.0)(matched, 5.0)[:, 0], expected)


def test_matchability_aware_loss_by_hand():
    # Boxes 0.4 x 0.4 and 0.4 x 0.2 about one centre: IoU q = 0.08 / 0.16 = 0.5, q^1.5 = 0.3535534.
    # Class 0, logit ln 3, p = 0.75: -(0.3535534 ln 0.75 + 0.6464466 ln 0.25) = 0.9978765.
    # Class 1, logit 0, p = 0.5, not the object's: 0.5^1.5 ln 2 = 0.2450645.
    matched = one_slot([math.log(3), 0.0], [0.5, 0.5, 0.4, 0.4], 0, (0.5, 0.5, 0.4, 0.2))
    assert MatchabilityAware()(matched, 1.0).item() == pytest.approx(1.2429410, abs=1e-6)
    # The same slot without object: 0.75^1.5 ln 4 + 0.2450645 = 0.9004247 + 0.2450645.
    matched = one_slot([math.log(3), 0.0], [0.5, 0.5, 0.4, 0.4])
    assert MatchabilityAware()(matched, 1.0).item() == pytest.approx(1.1454892, abs=1e-6)
    # No overlap at all: even the object's own class must be silent, -ln 0.25 = 1.3862944.
    matched = one_slot([math.log(3)], [0.1, 0.1, 0.1, 0.1], 0, (0.9, 0.9, 0.1, 0.1))
    assert MatchabilityAware()(matched, 1.0).item() == pytest.approx(1.3862944, abs=1e-6)


@pytest.mark.parametrize("gamma", [1.5, 2.0])
def test_matchability_aware_loss_agrees_with_a_loop_over_slots_and_classes(gamma):
    matched = random_matched()
    expected = [0.0, 0.0]
    for layer, image, slot in matched.is_real.nonzero().tolist():
        at = layer, image, slot
        overlap = plain_loops.iou(matched.boxes[at].tolist(), matched.target_boxes[at].tolist())
        for k, logit in enumerate(matched.logits[at].tolist()):
            is_target = bool(matched.is_positive[at]) and matched.labels[at].item() == k
            loss = plain_loops.matchability_aware_loss(logit, overlap if is_target else None, gamma)
            expected[layer] += loss / (2.0 * 4.0)
    found = MatchabilityAware(gamma=gamma)(matched, 4.0)
    assert_close(found[:, 0], torch.tensor(expected, dtype=torch.float64))


def test_the_class_loss_is_chosen_by_its_name():
    matched = random_matched()
    for kind, term in (
        ("focal", Focal(alpha=0.3, gamma=1.7)),
        ("mal", MatchabilityAware(gamma=1.3)),
        ("softmax", Softmax(unmatched_weight=0.2)),
    ):
        numbers = {"focal_alpha": 0.3, "focal_gamma": 1.7, "mal_gamma": 1.3}
        criterion = LossConfig(kind=kind, no_object_weight=0.2, **numbers).criterion()
        assert_close(criterion.terms["ce"][0](matched, 2.0), term(matched, 2.0))
    with pytest.raises(ValueError, match="must be one of .*'mal'.*, got 'vfl'"):
        LossConfig(kind="vfl")
    with pytest.raises(ValueError, match='"mal" needs box IoU'):
        LossConfig(kind="mal", l1_weight=0.0, giou_weight=0.0)


def test_matchability_aware_loss_has_no_gradient_through_its_weights():
    # d/dx of w softplus(x) is w p for classes that must be silent: 0.75^1.5 x 0.75 = 0.4871393,
    # and p - q^1.5 for the object's: 0.75 - 0.3535534.
    for label, expected in ((None, 0.4871393), (0, 0.3964466)):
        matched = one_slot([math.log(3)], [0.5, 0.5, 0.4, 0.4], label, (0.5, 0.5, 0.4, 0.2))
        matched = replace(
            matched,
            logits=matched.logits.requires_grad_(),
            boxes=matched.boxes.requires_grad_(),
        )
        MatchabilityAware()(matched, 1.0).sum().backward()
        assert matched.logits.grad.item() == pytest.approx(expected, abs=1e-6)
        assert matched.boxes.grad is None


def test_softmax_agrees_with_weighted_cross_entropy():
    matched = random_matched()
    last_class = matched.logits.shape[-1] - 1
    weight = torch.ones(last_class + 1, dtype=torch.float64)
    weight[last_class] = 0.1
    expected = []
    for layer in range(2):
        is_real = matched.is_real[layer]
        label = torch.where(matched.is_positive[layer], matched.labels[layer].clamp(max=3), 4)
        expected.append(cross_entropy(matched.logits[layer][is_real], label[is_real], weight))
    matched = replace(matched, labels=matched.labels.clamp(max=3))
    assert_close(Softmax()(matched, 1.0)[:, 0], torch.stack(expected))
    assert_close(Softmax()(matched, 7.0)[:, 0], torch.stack(expected))


def test_box_terms_agree_with_a_loop_over_slots_with_an_object():
    matched = random_matched(has_scores=True)
    l1, giou = [0.0, 0.0], [0.0, 0.0]
    for layer, image, slot in matched.is_positive.nonzero().tolist():
        box = matched.boxes[layer, image, slot].tolist()
        target = matched.target_boxes[layer, image, slot].tolist()
        share = matched.target_scores[layer, image, slot].item() / (2.0 * 3.0)
        l1[layer] += share * plain_loops.l1(box, target)
        giou[layer] += share * (1 - plain_loops.generalized_iou(box, target))
    assert_close(L1()(matched, 3.0)[:, 0], torch.tensor(l1, dtype=torch.float64))
    assert_close(GIoU()(matched, 3.0)[:, 0], torch.tensor(giou, dtype=torch.float64))


@pytest.mark.parametrize("term", [Focal, MatchabilityAware, Softmax])
def test_scores_weigh_matched_slots_and_a_constant_the_others(term):
    matched = one_slot([0.4, -0.3], [0.5, 0.5, 0.4, 0.4], 0, score=0.3)
    certain = replace(matched, target_scores=torch.ones(1, 1, 1))
    other = one_slot([0.4, -0.3], [0.5, 0.5, 0.4, 0.4])
    if term is Softmax:  # a mean: weights cancel in one slot alone
        both = replace(
            matched,
            sizes=(2,),
            **{
                name: torch.cat((getattr(matched, name), getattr(other, name)), dim=2)
                for name in (
                    ("logits", "boxes", "labels", "target_boxes", "target_scores")
                    + ("is_positive", "is_real")
                )
            },
        )
        mean = (0.3 * term()(certain, 1.0) + 0.5 * term()(other, 1.0)) / 0.8
        assert_close(term(unmatched_weight=0.5)(both, 1.0), mean)
        return
    assert_close(term()(matched, 1.0), 0.3 * term()(certain, 1.0))
    plain = term(unmatched_weight=1.0)(other, 1.0)
    assert_close(term(unmatched_weight=0.5)(other, 1.0), 0.5 * plain)


@pytest.mark.parametrize("name", TERMS)
def test_slots_without_choice_are_not_read_and_get_no_gradient(name):
    matched = random_matched()
    term = TERMS[name]
    expected = term(matched, 2.0)
    logits, boxes = matched.logits.clone(), matched.boxes.clone()
    logits[~matched.is_real] = 1e4
    boxes[~matched.is_real] = -1e4
    labels = torch.where(matched.is_positive, matched.labels, 3)
    target_boxes = torch.where(matched.is_positive[..., None], matched.target_boxes, 0.1)
    logits.requires_grad_(), boxes.requires_grad_()
    scribbled = replace(
        matched, logits=logits, boxes=boxes, labels=labels, target_boxes=target_boxes
    )
    found = term(scribbled, 2.0)
    assert_close(found, expected)
    found.sum().backward()
    for gradient in (logits.grad, boxes.grad):
        if gradient is not None:
            assert gradient.isfinite().all()
            assert (gradient[~matched.is_real] == 0).all()
    assert any(x.grad is not None and x.grad.abs().sum() > 0 for x in (logits, boxes))


@pytest.mark.parametrize("name", [name for name in TERMS if name != "mal"])
def test_gradients_agree_with_finite_differences(name):
    matched = random_matched(has_scores=True)
    inputs = matched.logits.requires_grad_(), matched.boxes.requires_grad_()

    def loss(logits, boxes):
        return TERMS[name](replace(matched, logits=logits, boxes=boxes), 2.0)

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("slots", [0, 4])
def test_without_objects_and_without_slots_losses_are_finite_and_attached(name, slots):
    targets = random_targets(0, 0)
    predictions = random_predictions(Segment("match", slots), batch=2)
    for is_real in (True, False):
        assignment = Assignment(
            torch.full((2, 2, slots), -1), torch.full((2, slots), is_real, dtype=torch.bool)
        )
        matched = gather_targets(predictions, targets, [assignment])
        logits, boxes = matched.logits.requires_grad_(), matched.boxes.requires_grad_()
        loss = TERMS[name](replace(matched, logits=logits, boxes=boxes), 1.0)
        assert loss.isfinite().all() and loss.requires_grad
        if name in ("l1", "giou") or slots == 0 or not is_real:
            assert (loss == 0).all()
        loss.sum().backward()
        for gradient in (logits.grad, boxes.grad):
            assert gradient is None or gradient.isfinite().all()
