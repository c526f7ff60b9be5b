import math

import pytest
import torch
from torch.testing import assert_close

from dn_detr.analysis.matching_instability import (
    anchor_target_distances,
    changed_matches,
    largest_distances,
    matching_instability,
)
from dn_detr.structures import Assignment, Target, pad_targets

NONE = -1


def assignment_of(*layers, is_real=None):
    object_of = torch.tensor(layers)
    if is_real is None:
        is_real = torch.ones(object_of.shape[1:], dtype=torch.bool)
    return Assignment(object_of, is_real)


def test_instability_counts_queries_with_another_object_in_each_image():
    # Image 0: query 0 keeps object 1, query 1 loses object 0, query 3 gains it: 2 changes.
    # Image 1: queries 0 and 1 swap their objects: 2 changes. Image 2: nothing changes.
    # Image 3: two objects move to two other queries: 4, twice the number of objects.
    previous = torch.tensor([[1, 0, NONE, NONE], [0, 1, 2, NONE], [NONE, 0, 1, 2], [0, 1, -1, -1]])
    current = torch.tensor([[1, NONE, NONE, 0], [1, 0, 2, NONE], [NONE, 0, 1, 2], [-1, -1, 1, 0]])
    assert changed_matches(previous, current).tolist() == [2, 2, 0, 4]
    assert matching_instability(previous, current).item() == 2.0
    assert matching_instability(previous, previous).item() == 0.0


def test_instability_of_assignments_is_that_of_the_last_layer_and_of_real_slots():
    is_real = torch.tensor([[True, True, True, False]])
    previous = assignment_of([[0, 1, NONE, NONE]], [[0, NONE, 1, 0]], is_real=is_real)
    current = assignment_of([[NONE, 0, 1, NONE]], [[1, NONE, 0, 1]], is_real=is_real)
    assert matching_instability(previous, current).item() == 2.0
    assert matching_instability(previous, torch.tensor([[0, NONE, 1, NONE]])).item() == 0.0


def test_instability_of_different_query_sets_is_refused():
    with pytest.raises(ValueError, match=r"got \[1, 3\] and \[1, 4\]"):
        matching_instability(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 4))


def two_images():
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.2, 0.8, 0.1, 0.1]])
    labels = torch.zeros(2, dtype=torch.int64)
    targets = pad_targets([Target(labels, boxes), Target(labels[:1], boxes[1:])])
    references = torch.tensor(
        [
            [[0.5, 0.5, 0.2, 0.4], [0.9, 0.9, 0.9, 0.9], [0.4, 0.7, 0.1, 0.3]],
            [[0.1, 0.1, 0.1, 0.1], [0.2, 0.9, 0.1, 0.4], [0.0, 0.0, 0.0, 0.0]],
        ]
    )
    # The first layer's matches must not count.
    first = [[1, 0, NONE], [NONE, NONE, 0]]
    return references, targets, assignment_of(first, [[0, NONE, 1], [NONE, 0, NONE]])


def test_distance_of_anchor_boxes_to_their_objects():
    # Image 0: query 0 sits on object 0: 0; query 2 and object 1: .2 + .1 + 0 + .2 = .5.
    # Image 1: query 1 and object 0: 0 + .1 + 0 + .3 = .4.
    references, targets, assignment = two_images()
    distances = anchor_target_distances(references, targets, assignment)
    assert_close(distances.sort().values, torch.tensor([0.0, 0.4, 0.5]))


def test_distance_of_anchor_points_to_the_centres_of_their_objects():
    # The same with the centres alone: 0, .2 + .1 and 0 + .1.
    references, targets, assignment = two_images()
    distances = anchor_target_distances(references[..., :2], targets, assignment)
    assert_close(distances.sort().values, torch.tensor([0.0, 0.1, 0.3]))


def test_mean_of_the_largest_distances():
    distances = torch.tensor([0.4, 0.0, 0.5, 0.2])
    assert_close(largest_distances(distances, 2), torch.tensor(0.45))
    assert_close(largest_distances(distances, 100), torch.tensor(0.275))
    with pytest.raises(ValueError, match="got 0"):
        largest_distances(distances, 0)


def test_without_matches_there_is_no_distance():
    references, targets, assignment = two_images()
    nothing = Assignment(torch.full_like(assignment.object_of, NONE), assignment.is_real)
    assert anchor_target_distances(references, targets, nothing).shape == (0,)
    assert math.isnan(largest_distances(torch.zeros(0)))


def test_references_that_are_neither_points_nor_boxes_are_refused():
    references, targets, assignment = two_images()
    with pytest.raises(ValueError, match=r"\[B, Q, 2 or 4\], got \[2, 3, 3\]"):
        anchor_target_distances(references[..., :3], targets, assignment)
    with pytest.raises(ValueError, match=r"must be \[2, 3, 2 or 4\].*got \[2, 1, 4\]"):
        anchor_target_distances(references[:, :1], targets, assignment)
