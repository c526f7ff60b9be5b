import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from dn_detr.structures import (
    Assignment,
    FeatureMaps,
    MaskFeatures,
    Memory,
    NoisedObjects,
    Predictions,
    Queries,
    QueryState,
    Segment,
    Target,
    check_segments,
    pad_targets,
)

BOX = [0.5, 0.5, 0.2, 0.2]


def target(count, **options):
    labels = torch.arange(1, count + 1)
    boxes = torch.tensor([[0.1 * (i + 1), 0.5, 0.2, 0.2] for i in range(count)]).view(count, 4)
    return Target(labels, boxes, **options)


def predictions(*segments, layers=2, batch=3, **options):
    slots = sum(segment.size for segment in segments)
    return Predictions(
        **{
            "logits": torch.randn(layers, batch, slots, 5),
            "boxes": torch.rand(layers, batch, slots, 4),
            "references": tuple(torch.rand(batch, slots, 2 + 2 * i) for i in range(layers)),
            "segments": segments,
            **options,
        }
    )


# -------------------------------------------------------------------------------- ground truth


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"labels": torch.zeros(2, dtype=torch.int32)}, "labels must be int64, got torch.int32"),
        ({"boxes": torch.zeros(2, 5)}, "boxes must be [2, 4], got [2, 5]"),
        ({"boxes": torch.zeros(3, 4)}, "boxes must be [2, 4], got [3, 4]"),
        ({"boxes": torch.zeros(2, 4, dtype=torch.int64)}, "boxes must be floating point, got"),
        ({"boxes": torch.tensor([BOX, [0.5, float("nan"), 0.1, 0.1]])}, "boxes must be finite"),
        ({"boxes": torch.tensor([BOX, [0.5, 0.5, 0.0, 0.1]])}, "width and height > 0, got"),
        ({"labels": torch.tensor([0, -1])}, "labels must be >= 0, got [0, -1]"),
        ({"masks": torch.zeros(2, 8, 8)}, "masks must be bool, got torch.float32"),
        ({"masks": torch.zeros(1, 8, 8) > 0}, "masks must be [2, any, any], got [1, 8, 8]"),
        ({"scores": torch.tensor([0.5, 0.0])}, "scores must be in (0, 1], got [0.5, 0.0]"),
        ({"scores": torch.tensor([0.5])}, "scores must be [2], got [1]"),
    ],
)
def test_a_wrong_target_says_what_was_expected_and_what_came(wrong, message):
    right = {"labels": torch.tensor([0, 1]), "boxes": torch.tensor([BOX, BOX])}
    Target(**right)
    with pytest.raises(ValueError, match=re.escape(message)):
        Target(**{**right, **wrong})


@pytest.mark.parametrize(("multiple_of", "most"), [(1, 3), (2, 4), (3, 3), (8, 8)])
def test_targets_are_padded_to_the_fullest_image_rounded_up(multiple_of, most):
    targets = pad_targets([target(1), target(0), target(3, noise_seed=7)], multiple_of)
    assert targets.counts == (1, 0, 3)
    assert targets.boxes.shape == (3, most, 4)
    padding = [0] * (most - 3)
    assert targets.labels.tolist() == [
        [1, 0, 0, *padding],
        [0, 0, 0, *padding],
        [1, 2, 3, *padding],
    ]
    assert targets.is_object.sum(1).tolist() == [1, 0, 3]
    assert targets.is_object[2, :3].all() and targets.is_object[0, 0]
    assert (targets.boxes[~targets.is_object] == 0.5).all()
    assert torch.equal(targets.boxes[2, :3], target(3).boxes)
    assert targets.noise_seeds.tolist() == [0, 0, 7]
    assert targets.scores is None and targets.masks is None


def test_a_batch_without_objects_still_has_one_padded_slot():
    targets = pad_targets([target(0), target(0)])
    assert targets.counts == (0, 0)
    assert targets.labels.shape == (2, 1) and not targets.is_object.any()


def test_masks_stay_ragged_and_scores_are_padded_with_one():
    masks = [torch.rand(2, 4, 6) > 0.5, torch.rand(0, 5, 5) > 0.5]
    scores = [torch.tensor([0.3, 0.9]), torch.zeros(0)]
    targets = pad_targets(
        [
            target(count, masks=mask, scores=score)
            for count, mask, score in zip((2, 0), masks, scores, strict=True)
        ]
    )
    assert [tuple(mask.shape) for mask in targets.masks] == [(2, 4, 6), (0, 5, 5)]
    assert torch.equal(targets.masks[0], masks[0])
    assert torch.equal(targets.scores, torch.tensor([[0.3, 0.9], [1.0, 1.0]]))


def test_targets_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="at least one image, got none"):
        pad_targets([])
    with pytest.raises(ValueError, match="multiple_of must be >= 1, got 0"):
        pad_targets([target(1)], 0)
    with pytest.raises(ValueError, match="either all or none of the targets must have scores"):
        pad_targets([target(1, scores=torch.ones(1)), target(1)])


def test_targets_move_to_a_device_as_a_whole_but_for_the_counts():
    masks = torch.zeros(1, 2, 2) > 0
    moved = pad_targets([target(1, masks=masks, scores=torch.ones(1))]).to("meta")
    for field in fields(moved):
        value = getattr(moved, field.name)
        if field.name == "masks":
            (value,) = value
        assert field.name == "counts" or value.device.type == "meta", field.name
    assert moved.counts == (1,)


# ------------------------------------------------------------------------------ what flows


def test_structures_cannot_be_changed_and_are_compared_by_identity():
    targets = pad_targets([target(2)])
    with pytest.raises(FrozenInstanceError):
        targets.labels = targets.labels
    assert targets == targets and targets != replace(targets)


def test_feature_maps_and_memory_check_their_shapes():
    padding = torch.zeros(2, 3, 4, dtype=torch.bool)
    FeatureMaps((torch.zeros(2, 8, 3, 4),), (padding,), (8,))
    with pytest.raises(ValueError, match="of one length, got 1, 1 and 2"):
        FeatureMaps((torch.zeros(2, 8, 3, 4),), (padding,), (8, 16))
    with pytest.raises(ValueError, match=re.escape("padding[0] must be [2, 4, 3], got [2, 3, 4]")):
        FeatureMaps((torch.zeros(2, 8, 4, 3),), (padding,), (8,))
    tokens = torch.zeros(2, 12, 8)
    right = (tokens, tokens, padding.flatten(1), ((3, 4),), torch.ones(2, 1, 2))
    Memory(*right)
    with pytest.raises(ValueError, match=re.escape("valid_sizes must be [2, 1, 2], got [2, 2]")):
        Memory(*right[:-1], torch.ones(2, 2))
    with pytest.raises(ValueError, match="padding must be bool, got torch.float32"):
        Memory(*right[:2], torch.zeros(2, 12), *right[3:])


def test_noised_objects_check_their_shapes():
    slots = torch.zeros(2, 6, dtype=torch.int64)
    right = (slots, torch.zeros(2, 6, 4), slots, slots > 0, 2)
    NoisedObjects(*right)
    with pytest.raises(ValueError, match=re.escape("assignment must be [2, 6], got [2, 5]")):
        NoisedObjects(*right[:2], slots[:, :5], *right[3:])


def test_query_states_are_joined_along_the_query_axis():
    first = QueryState(torch.zeros(2, 3, 8), None, torch.zeros(2, 3, 4))
    second = QueryState(torch.ones(2, 5, 8), None, torch.ones(2, 5, 4))
    joined = QueryState.cat([first, second])
    assert joined.content.shape == (2, 8, 8) and joined.position is None
    assert joined.reference[:, :3].sum() == 0 and (joined.reference[:, 3:] == 1).all()
    with pytest.raises(ValueError, match="either all or none of the query states must have refe"):
        QueryState.cat([first, replace(second, reference=None)])
    with pytest.raises(ValueError, match=re.escape("reference must be [2, 3, any], got [2, 5, 4]")):
        replace(first, reference=second.reference)


def test_segments_must_fill_the_queries_and_name_each_other_correctly():
    match, denoise = Segment("match", 4), Segment("dn", 6, num_groups=2, attends_to=("match",))
    check_segments((denoise, match), 10)
    with pytest.raises(ValueError, match="segments hold 10 queries, but there are 9 queries"):
        check_segments((denoise, match), 9)
    with pytest.raises(ValueError, match=r"unique, got \['match', 'match'\]"):
        check_segments((match, match), 8)
    with pytest.raises(ValueError, match=r"'dn' attends to \['match'\], known are \['dn'\]"):
        check_segments((denoise,), 6)
    with pytest.raises(ValueError, match="num_groups must divide size 6, got 4"):
        replace(denoise, num_groups=4)
    with pytest.raises(ValueError, match=re.escape("match.is_empty must be [any, 4], got [2, 3]")):
        replace(match, is_empty=torch.zeros(2, 3) > 0)
    with pytest.raises(ValueError, match="match.assignment must be int64, got torch.float32"):
        replace(match, assignment=torch.zeros(2, 4))
    state = QueryState(torch.zeros(2, 9, 8), None, None)
    with pytest.raises(ValueError, match="segments hold 10 queries, but there are 9 queries"):
        Queries(state, (denoise, match))


# ------------------------------------------------------------------------------- outcomes


def test_predictions_of_a_segment_are_views_of_its_slots():
    denoise, match = Segment("dn", 6, attends_to=("match",), weight=2.0), Segment("match", 4)
    mask_features = MaskFeatures(torch.randn(3, 8, 4, 4), torch.full((3, 2), 4.0))
    embeddings = torch.randn(2, 3, 10, 8)
    whole = predictions(denoise, match, mask_embeddings=embeddings, mask_features=mask_features)
    for name, slots in (("dn", slice(0, 6)), ("match", slice(6, 10))):
        part = whole.of(name)
        assert torch.equal(part.logits, whole.logits[:, :, slots])
        assert torch.equal(part.boxes, whole.boxes[:, :, slots])
        assert torch.equal(part.mask_embeddings, whole.mask_embeddings[:, :, slots])
        for got, reference in zip(part.references, whole.references, strict=True):
            assert torch.equal(got, reference[:, slots])
        assert part.logits.untyped_storage().data_ptr() == whole.logits.untyped_storage().data_ptr()
        assert [segment.name for segment in part.segments] == [name]
    assert whole.of("dn").segments[0].weight == 2.0
    with pytest.raises(ValueError, match=r"no segment 'groups', only \['dn', 'match'\]"):
        whole.of("groups")


def test_predictions_check_their_shapes():
    match = Segment("match", 4)
    assert predictions(match, boxes=None, references=(None, None)).of("match").boxes is None
    with pytest.raises(ValueError, match=re.escape("boxes must be [2, 3, 4, 4], got [2, 3, 4, 5]")):
        predictions(match, boxes=torch.rand(2, 3, 4, 5))
    with pytest.raises(ValueError, match="references must have 2 entries, got 1"):
        predictions(match, references=(None,))


def test_positive_slots_come_first_and_in_order():
    object_of = torch.tensor([[[-1, 2, -1, 0, 1], [-1, -1, -1, -1, 0]]])
    assignment = Assignment(object_of, torch.ones(2, 5, dtype=torch.bool))
    # Padded with slots without object, also in order.
    assert assignment.positive_slots(4).tolist() == [[[1, 3, 4, 0], [4, 0, 1, 2]]]
    with pytest.raises(ValueError, match=re.escape("is_real must be [2, 5], got [2, 4]")):
        replace(assignment, is_real=assignment.is_real[:, :4])
