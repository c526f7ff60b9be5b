from dataclasses import replace

import plain_loops
import pytest
import torch
from random_values import random_mask, random_predictions, random_targets
from tiny import key_of
from torch.testing import assert_close

from dn_detr.losses.criterion import Criterion, gather_targets, summarize
from dn_detr.losses.loss_terms import L1, Focal, GIoU, MatchabilityAware, Softmax
from dn_detr.losses.matcher import Costs, assign
from dn_detr.structures import Segment

TERMS = {"ce": (Focal(), 1.0), "bbox": (L1(), 5.0), "giou": (GIoU(), 2.0)}


def denoise_segment(targets, num_groups=2):
    """A slot for every object in every group; the other slots of its image are empty."""
    index = torch.arange(targets.labels.shape[1])
    fixed = torch.where(targets.is_object, index, -1).repeat(1, num_groups)
    return Segment(
        "dn",
        fixed.shape[1],
        num_groups=num_groups,
        attends_to=("match",),
        assignment=fixed,
        is_empty=fixed < 0,
        positives_per_object=float(num_groups),
    )


def everything(*counts, layers=3, **options):
    """Targets and predictions with denoising, groups and proposals."""
    targets = random_targets(*counts, **options)
    batch = len(counts)
    proposals = random_predictions(
        Segment("match", 12, is_empty=random_mask(batch, 12, probability=0.3)),
        layers=1,
        batch=batch,
        is_class_agnostic=True,
    )
    segments = (
        denoise_segment(targets),
        Segment("match", 6, weight=0.5),
        Segment("group", 12, num_groups=2, positives_per_object=2.0, weight=0.5),
    )
    predictions = random_predictions(*segments, layers=layers, batch=batch, proposals=proposals)
    return predictions, targets


def leaves(predictions):
    """The same predictions as leaves of a graph, and these."""
    proposals = predictions.proposals
    if proposals is not None:
        proposals = leaves(proposals)
    logits = predictions.logits.clone().requires_grad_()
    boxes = predictions.boxes.clone().requires_grad_()
    return replace(predictions, logits=logits, boxes=boxes, proposals=proposals)


def losses_in_plain_loops(predictions, targets, assignments, num_objects):
    expected = {}
    parts = {segment.name: predictions.of(segment.name) for segment in predictions.segments}
    parts["encoder/match"] = predictions.proposals
    for name, part in parts.items():
        segment = part.segments[0]
        infix = {"match": "", "encoder/match": "_enc"}.get(name, f"_{name}")
        layers, batch, size, _ = part.logits.shape
        for layer in range(layers):
            total = {"ce": 0.0, "bbox": 0.0, "giou": 0.0}
            for image in range(batch):
                for slot in range(size):
                    if segment.is_empty is not None and segment.is_empty[image, slot]:
                        continue
                    j = assignments[name].object_of[layer, image, slot].item()
                    label = 0 if part.is_class_agnostic else targets.labels[image, j].item()
                    for k, logit in enumerate(part.logits[layer, image, slot].tolist()):
                        total["ce"] += plain_loops.focal_loss(logit, j >= 0 and k == label)
                    if j >= 0:
                        box = part.boxes[layer, image, slot].tolist()
                        target = targets.boxes[image, j].tolist()
                        total["bbox"] += 5 * plain_loops.l1(box, target)
                        total["giou"] += 2 * (1 - plain_loops.generalized_iou(box, target))
            suffix = "" if layer == layers - 1 else f"_{layer}"
            for term, value in total.items():
                value = value * segment.weight / (segment.positives_per_object * num_objects)
                expected[f"loss_{term}{infix}{suffix}"] = value
    return expected


@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0, 0), (9, 1, 2)])
def test_every_loss_agrees_with_plain_loops(counts):
    predictions, targets = everything(*counts, multiple_of=4)
    assignments = assign(predictions, targets, Costs())
    found = Criterion(TERMS)(predictions, targets, assignments, 2.5)
    expected = losses_in_plain_loops(predictions, targets, assignments, 2.5)
    assert list(found) and set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].item() == pytest.approx(value, rel=1e-9, abs=1e-12), key


def test_keys_do_not_depend_on_the_objects():
    keys = []
    for counts in ((3, 0, 5), (0, 0, 0)):
        predictions, targets = everything(*counts)
        assignments = assign(predictions, targets, Costs())
        keys.append(list(Criterion(TERMS)(predictions, targets, assignments, 1.0)))
    assert keys[0] == keys[1]
    assert [key for key in keys[0] if "giou" in key] == [
        *("loss_giou_dn_0", "loss_giou_dn_1", "loss_giou_dn"),
        *("loss_giou_0", "loss_giou_1", "loss_giou"),
        *("loss_giou_group_0", "loss_giou_group_1", "loss_giou_group"),
        "loss_giou_enc",
    ]


def test_suffix_and_segments_make_a_second_criterion_over_the_same_predictions():
    predictions, _ = everything(3, 0, 5)
    teacher = random_targets(4, 2, 0, seed=5, has_scores=True)
    assignments = assign(predictions, teacher, Costs(), only=("match",))
    terms = {"ce": (Focal(unmatched_weight=0.5), 1.0)}
    criterion = Criterion(terms, suffix="teacher", segments=("match",))
    found = criterion(predictions, teacher, assignments, 6.0)
    assert list(found) == ["loss_ce_teacher_0", "loss_ce_teacher_1", "loss_ce_teacher"]
    with pytest.raises(ValueError, match=r"'dn' has no assignment, only \['match'\] have"):
        Criterion(terms)(predictions, teacher, assignments, 6.0)
    with pytest.raises(ValueError, match=r"no segments \['denoise'\]"):
        Criterion(terms, segments=("denoise",))(predictions, teacher, assignments, 6.0)
    with pytest.raises(ValueError, match="lower-case letters, got 'ce_0'"):
        Criterion({"ce_0": (Focal(), 1.0)})


def test_totals_of_each_segment():
    predictions, targets = everything(3, 0, 5)
    assignments = assign(predictions, targets, Costs())
    losses = Criterion(TERMS)(predictions, targets, assignments, 8.0)
    teacher = {"loss_ce_dn_teacher_0": torch.tensor(1.0)}
    totals = summarize({**losses, **teacher})
    assert list(totals) == [*("loss_dn", "loss_match", "loss_group", "loss_enc", "loss_dn_teacher")]
    by_hand = sum(
        losses[f"loss_{term}{suffix}"]
        for term in ("ce", "bbox", "giou")
        for suffix in ("", "_0", "_1")
    )
    assert_close(totals["loss_match"], by_hand)
    assert_close(sum(totals.values()) - 1, sum(losses.values()))
    with pytest.raises(ValueError, match="got 'total_loss'"):
        summarize({"total_loss": torch.tensor(1.0)})


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("channels", [slice(None), slice(1)])
@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0, 0)])
def test_garbage_in_empty_slots_changes_no_loss_and_no_gradient(garbage, channels, counts):
    predictions, targets = everything(*counts)
    assignments = assign(predictions, targets, Costs())
    terms = {**TERMS, "mal": (MatchabilityAware(), 1.0), "softmax": (Softmax(), 1.0)}
    gradients = []
    for is_scribbled in (False, True):
        part = leaves(predictions)
        if is_scribbled:
            empty = part.segment("dn").is_empty
            width = empty.shape[1]
            for values in (part.logits, part.boxes):
                values.data[:, :, :width, channels][:, empty] = garbage
            for values in (part.proposals.logits, part.proposals.boxes):
                values.data[..., channels][:, part.proposals.segments[0].is_empty] = garbage
        losses = Criterion(terms)(part, targets, assignments, 4.0)
        sum(losses.values()).backward()
        gradients.append((part.logits.grad, part.boxes.grad, part.proposals.boxes.grad))
        gradients[-1] += (torch.stack(list(losses.values())).detach(),)
    for plain, scribbled in zip(*gradients, strict=True):
        assert scribbled.isfinite().all()
        assert torch.equal(plain, scribbled)


def test_an_object_named_in_an_empty_slot_counts_for_nothing():
    predictions, targets = everything(3, 0, 5)
    assignments = assign(predictions, targets, Costs())
    expected = Criterion(TERMS)(predictions, targets, assignments, 8.0)
    denoise = assignments["dn"]
    named = torch.where(denoise.is_real, denoise.object_of, 1)
    assignments["dn"] = replace(denoise, object_of=named)
    found = Criterion(TERMS)(predictions, targets, assignments, 8.0)
    for key in expected:
        assert torch.equal(found[key], expected[key])


def test_an_empty_batch_gives_zero_box_losses_that_are_part_of_the_graph():
    predictions, targets = everything(0, 0, 0)
    predictions = leaves(predictions)
    assignments = assign(predictions, targets, Costs())
    losses = Criterion(TERMS)(predictions, targets, assignments, 1.0)
    for key, value in losses.items():
        assert value.requires_grad and value.isfinite(), key
        if "_ce" not in key or "dn" in key:
            assert value == 0, key
    sum(losses.values()).backward()
    denoise = slice(0, predictions.segment("dn").size)
    assert (predictions.logits.grad[:, :, denoise] == 0).all()
    assert (predictions.boxes.grad == 0).all()
    assert predictions.logits.grad.isfinite().all() and predictions.logits.grad.any()


def test_the_order_of_objects_does_not_matter():
    predictions, targets = everything(3, 0, 5, has_scores=True)
    before = Criterion(TERMS)(predictions, targets, assign(predictions, targets, Costs()), 8.0)
    order = torch.stack(
        [torch.tensor([2, 0, 1, 3, 4]), torch.arange(5), torch.tensor([4, 2, 0, 1, 3])]
    )
    place_of = order.argsort(1)
    shuffled = replace(
        targets,
        labels=targets.labels.gather(1, order),
        boxes=targets.boxes.gather(1, order[..., None].expand(-1, -1, 4)),
        scores=targets.scores.gather(1, order),
    )
    segment = predictions.segments[0]
    moved = place_of.gather(1, segment.assignment.clamp(min=0))
    segment = replace(
        segment, assignment=torch.where(segment.assignment >= 0, moved, segment.assignment)
    )
    predictions = replace(predictions, segments=(segment, *predictions.segments[1:]))
    after = Criterion(TERMS)(predictions, shuffled, assign(predictions, shuffled, Costs()), 8.0)
    assert list(after) == list(before)
    for key in before:
        assert_close(after[key], before[key])


def test_losses_of_groups_are_the_mean_of_those_of_each_group():
    targets = random_targets(3, 0, 4)
    terms = {"softmax": (Softmax(), 1.0), **TERMS}
    group = random_predictions(*(Segment(f"group{i}", 6) for i in range(3)))
    pooled = replace(
        group, segments=(Segment("match", 18, num_groups=3, positives_per_object=3.0),)
    )
    criterion = Criterion(terms)
    each = criterion(group, targets, assign(group, targets, Costs()), 7.0)
    together = criterion(pooled, targets, assign(pooled, targets, Costs()), 7.0)
    for key, value in together.items():
        mean = sum(each[key_of(key, f"group{i}")] for i in range(3)) / 3
        assert_close(value, mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_under_autocast(dtype):
    predictions, targets = everything(3, 0, 5)
    targets = replace(targets, boxes=targets.boxes.float())
    proposals = replace(
        predictions.proposals,
        logits=predictions.proposals.logits.to(dtype),
        boxes=predictions.proposals.boxes.float(),
    )
    half = replace(
        predictions,
        logits=predictions.logits.to(dtype),
        boxes=predictions.boxes.float(),
        proposals=proposals,
    )
    full = replace(
        half,
        logits=half.logits.float(),
        proposals=replace(proposals, logits=proposals.logits.float()),
    )
    terms = {**TERMS, "mal": (MatchabilityAware(), 1.0), "softmax": (Softmax(), 1.0)}
    assignments = assign(full, targets, Costs())
    expected = Criterion(terms)(full, targets, assignments, 8.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = Criterion(terms)(half, targets, assignments, 8.0)
    for key, value in found.items():
        assert value.dtype == torch.float32
        assert_close(value, expected[key])


def test_the_number_of_objects_may_be_a_tensor():
    predictions, targets = everything(3, 0, 5)
    assignments = assign(predictions, targets, Costs())
    with_float = Criterion(TERMS)(predictions, targets, assignments, 8.0)
    with_tensor = Criterion(TERMS)(predictions, targets, assignments, torch.tensor(8.0))
    for key in with_float:
        assert_close(with_tensor[key], with_float[key])


def test_the_criterion_compiles_into_one_graph():
    terms = {**TERMS, "mal": (MatchabilityAware(), 1.0), "softmax": (Softmax(), 1.0)}
    criterion = Criterion(terms)
    compiled = torch.compile(lambda *inputs: criterion(*inputs), fullgraph=True, backend="eager")
    for counts in ((3, 0, 5), (0, 0, 2)):
        predictions, targets = everything(*counts, multiple_of=8)
        predictions = leaves(predictions)
        assignments = assign(predictions, targets, Costs())
        expected = criterion(predictions, targets, assignments, torch.tensor(4.0))
        found = compiled(predictions, targets, assignments, torch.tensor(4.0))
        assert list(found) == list(expected)
        for key in found:
            assert_close(found[key], expected[key])
        sum(found.values()).backward()


def test_a_layer_whose_matching_is_bad_has_the_loss_nan_and_no_other():
    predictions, targets = everything(2, 0, 4)
    assignments = assign(predictions, targets, Costs())
    expected = Criterion(TERMS)(predictions, targets, assignments, 6.0)
    is_bad = torch.zeros(3, 3, dtype=torch.bool)
    is_bad[1, 2] = True
    assignments["match"] = replace(assignments["match"], is_bad=is_bad)
    losses = Criterion(TERMS)(predictions, targets, assignments, 6.0)
    for name, value in losses.items():
        is_of_layer = name in ("loss_ce_1", "loss_bbox_1", "loss_giou_1")
        assert value.isnan() if is_of_layer else value == expected[name], name


def test_matched_slots_stand_beside_their_object():
    predictions, targets = everything(3, 0, 5, has_scores=True)
    part = predictions.of("dn")
    assignment = assign(predictions, targets, Costs())["dn"]
    matched = gather_targets(part, targets, [assignment])
    assert matched.is_positive.sum() == 2 * 3 * 8  # groups x layers x objects
    for layer, image, slot in matched.is_positive.nonzero().tolist():
        j = assignment.object_of[layer, image, slot]
        here = layer, image, slot
        assert matched.labels[here] == targets.labels[image, j]
        assert matched.target_scores[here] == targets.scores[image, j]
        assert torch.equal(matched.target_boxes[here], targets.boxes[image, j])
        assert torch.equal(matched.logits[here], part.logits[here])
    assert (matched.labels[:, 1] == 0).all() and (matched.target_boxes[:, 1] == 0.5).all()
