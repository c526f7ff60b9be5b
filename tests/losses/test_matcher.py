import itertools
from dataclasses import replace

import numpy as np
import plain_loops
import pytest
import torch
from random_values import random_mask, random_predictions, random_targets
from scipy.optimize import linear_sum_assignment
from torch.utils._python_dispatch import TorchDispatchMode

import dn_detr.losses.matcher as assign_module
from dn_detr.losses.matcher import Costs, assign, find_nonfinite
from dn_detr.ops.extension import KERNELS
from dn_detr.structures import Segment

pytestmark = pytest.mark.usefixtures("operators")


def pair_costs(part, targets, layer, image):
    """Costs [n, size] of one layer and image, pair after pair."""
    count = targets.counts[image]
    return np.array(
        [
            [
                plain_loops.matching_cost(
                    part.logits[layer, image, slot].tolist(),
                    part.boxes[layer, image, slot].tolist(),
                    0 if part.is_class_agnostic else targets.labels[image, j].item(),
                    targets.boxes[image, j].tolist(),
                )
                for slot in range(part.logits.shape[2])
            ]
            for j in range(count)
        ]
    ).reshape(count, part.logits.shape[2])


def assign_one_by_one(part, targets, layer, image):
    """Object of each slot of one layer and image, as a list."""
    segment = part.segments[0]
    cost = pair_costs(part, targets, layer, image)
    object_of = [-1] * segment.size
    per_group = segment.size // segment.num_groups
    for first in range(0, segment.size, per_group):
        slots = [
            slot
            for slot in range(first, first + per_group)
            if segment.is_empty is None or not segment.is_empty[image, slot]
        ]
        objects = list(range(cost.shape[0])) * segment.matches_per_object
        chosen = cost[np.ix_(objects, slots)] if objects else np.zeros((0, len(slots)))
        for row, column in zip(*linear_sum_assignment(chosen), strict=True):
            object_of[slots[column]] = objects[row]
    return object_of


def check_against_one_by_one(part, targets, assignment):
    layers, batch, _ = assignment.object_of.shape
    for layer, image in itertools.product(range(layers), range(batch)):
        expected = assign_one_by_one(part, targets, layer, image)
        assert assignment.object_of[layer, image].tolist() == expected, (layer, image)


def test_the_matcher_finds_the_best_of_all_permutations():
    targets = random_targets(3, 4)
    predictions = random_predictions(Segment("match", 5), batch=2)
    object_of = assign(predictions, targets, Costs())["match"].object_of
    for layer, image in itertools.product(range(2), range(2)):
        cost = pair_costs(predictions, targets, layer, image)
        count = cost.shape[0]
        best = min(
            itertools.permutations(range(5), count),
            key=lambda slots: sum(cost[j, slot] for j, slot in enumerate(slots)),
        )
        expected = [-1] * 5
        for j, slot in enumerate(best):
            expected[slot] = j
        assert object_of[layer, image].tolist() == expected


MATCHED = {
    "plain": {},
    "group": {"num_groups": 3},
    "matches_per_object": {"matches_per_object": 2},
    "groups and matches_per_object": {"num_groups": 2, "matches_per_object": 3},
    "empty slots": {"is_empty": random_mask(3, 12, probability=0.4)},
    "mostly empty groups": {"num_groups": 2, "is_empty": random_mask(3, 12, probability=0.8)},
}


@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0, 0), (15, 1, 13), (1, 1, 1)])
@pytest.mark.parametrize("case", MATCHED)
def test_every_layer_image_and_group_agrees_with_a_loop(case, counts):
    targets = random_targets(*counts, multiple_of=4)
    segment = Segment("match", 12, **MATCHED[case])
    predictions = random_predictions(segment, seed=sum(counts))
    found = assign(predictions, targets, Costs())["match"]
    check_against_one_by_one(predictions, targets, found)
    if segment.is_empty is not None:
        assert (found.object_of[:, segment.is_empty] == -1).all()
        assert torch.equal(found.is_real, ~segment.is_empty)


def test_fixed_assignments_pass_through_and_matched_segments_do_not_see_their_neighbours():
    targets = random_targets(2, 0, 4)
    fixed = torch.full((3, 6), -1)
    fixed[0, :2] = torch.tensor([1, 0])
    denoise = Segment("dn", 6, assignment=fixed, is_empty=fixed < 0)
    segments = (denoise, Segment("match", 5), Segment("group", 10, num_groups=2))
    predictions = random_predictions(*segments)
    found = assign(predictions, targets, Costs())
    assert list(found) == ["dn", "match", "group"]
    assert torch.equal(found["dn"].object_of, fixed.expand(2, 3, 6))
    assert found["dn"].object_of.data_ptr() == fixed.data_ptr()
    assert torch.equal(found["dn"].is_real, fixed >= 0)
    for name in ("match", "group"):
        check_against_one_by_one(predictions.of(name), targets, found[name])


@pytest.mark.parametrize("is_class_agnostic", [False, True])
def test_proposals_are_matched_like_a_decoder_layer(is_class_agnostic):
    targets = random_targets(2, 0, 4)
    is_empty = random_mask(3, 20, probability=0.3)
    proposals = random_predictions(
        Segment("match", 20, is_empty=is_empty),
        layers=1,
        seed=7,
        is_class_agnostic=is_class_agnostic,
    )
    predictions = random_predictions(Segment("match", 6), proposals=proposals)
    found = assign(predictions, targets, Costs())
    assert list(found) == ["match", "encoder/match"]
    check_against_one_by_one(predictions, targets, found["match"])
    check_against_one_by_one(proposals, targets, found["encoder/match"])


def test_only_the_wanted_segments_are_answered():
    targets = random_targets(2, 0, 4)
    predictions = random_predictions(Segment("match", 5), Segment("group", 5))
    everything = assign(predictions, targets, Costs())
    found = assign(predictions, targets, Costs(), only=("group",))
    assert list(found) == ["group"]
    assert torch.equal(found["group"].object_of, everything["group"].object_of)
    with pytest.raises(ValueError, match=r"no segments \['dn'\], only \['match', 'group'\]"):
        assign(predictions, targets, Costs(), only=("dn",))


@pytest.mark.parametrize("field", ["logits", "boxes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("counts", [(1, 2, 3), (1, 2, 0)])
def test_what_is_not_finite_is_named_instead_of_matched(field, value, counts):
    targets = random_targets(*counts)
    predictions = random_predictions(Segment("match", 4), Segment("group", 4))
    getattr(predictions, field)[1, 2, 5, 0] = value
    with pytest.raises(FloatingPointError, match=r"segment 'group', layer 1, image 2 .*\(1 such"):
        assign(predictions, targets, Costs())
    assign(predictions, targets, Costs(), only=("match",))


def test_a_cost_that_overflows_is_named():
    targets = random_targets(1, 2, 3)
    predictions = random_predictions(Segment("match", 4))
    predictions.boxes[0, 1] = 1e308
    with pytest.raises(FloatingPointError, match="costs of segment 'match', layer 0, image 1"):
        assign(predictions, targets, Costs())


def test_nan_in_empty_slots_is_no_error():
    is_empty = random_mask(3, 12, probability=0.4)
    targets = random_targets(1, 2, 3)
    predictions = random_predictions(Segment("match", 12, is_empty=is_empty))
    expected = assign(predictions, targets, Costs())["match"].object_of
    predictions.logits[:, is_empty] = torch.nan
    predictions.boxes[:, is_empty] = torch.inf
    assert torch.equal(assign(predictions, targets, Costs())["match"].object_of, expected)


def test_matching_reads_nothing_on_the_host_but_all_costs_at_once_where_scipy_does_it(
    monkeypatch, operators
):
    targets = random_targets(2, 0, 4)
    proposals = random_predictions(Segment("match", 200), layers=1)
    segments = Segment("match", 6), Segment("group", 12, num_groups=2)
    predictions = random_predictions(*segments, proposals=proposals)
    # What the CPU does in addition, because there it costs nothing.
    monkeypatch.setattr(assign_module, "find_nonfinite", lambda _assignments: "")
    copies = []
    for name in ("cpu", "item", "tolist", "nonzero", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, _name=name, _original=original, **kwargs):
            copies.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)

    class Waits(TorchDispatchMode):
        """Counts the operators that must read values before they know their result's shape."""

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if torch.Tag.data_dependent_output in operator.tags:
                copies.append(str(operator))
            if operator is torch.ops.aten.index.Tensor:
                assert all(i is None or i.dtype == torch.int64 for i in args[1])
            return operator(*args, **(kwargs or {}))

    with Waits():
        assign(predictions, targets, Costs())
    assert copies == (["cpu"] if operators == "plain" else [])


def to_gpu(value):
    return replace(
        value,
        logits=value.logits.cuda(),
        boxes=value.boxes.cuda(),
        proposals=None if value.proposals is None else to_gpu(value.proposals),
    )


@pytest.mark.skipif("cuda" not in KERNELS.get("assign_objects", ()), reason="no CUDA kernels")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_never_waited_for_and_agrees_with_the_cpu(operators):
    targets = random_targets(2, 0, 4)
    proposals = random_predictions(Segment("match", 200), layers=1)
    predictions = random_predictions(Segment("match", 6), proposals=proposals)
    expected = assign(predictions, targets, Costs())
    predictions, targets = to_gpu(predictions), targets.to("cuda")
    assign(predictions, targets, Costs())
    torch.cuda.set_sync_debug_mode("error" if operators == "compiled" else "default")
    try:
        found = assign(predictions, targets, Costs())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, assignment in found.items():
        assert torch.equal(assignment.object_of.cpu(), expected[name].object_of)
    assert not find_nonfinite(found)
    predictions.proposals.logits[0, 2, 150, 0] = torch.nan
    found = assign(predictions, targets, Costs())
    assert "segment 'encoder/match', layer 0, image 2 " in find_nonfinite(found)
