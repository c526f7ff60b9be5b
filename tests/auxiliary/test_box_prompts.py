"""Prompted objects: they are seen by the matched queries, which find the others."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny import (
    METHODS_WITH_MASKS,
    tiny_features,
    tiny_losses,
    tiny_model,
    tiny_padding,
    tiny_target,
    tiny_targets,
)

from dn_detr.auxiliary.box_prompts import PromptedObjects, RandomBoxPrompts, add_prompts
from dn_detr.build import BoxPrompting, Denoising, HybridMatching
from dn_detr.layers.query_attention import allowed_pairs
from dn_detr.losses.matcher import Costs, assign
from dn_detr.methods import METHODS
from dn_detr.structures import Predictions, Segment, pad_targets

NAMES = [method for method in METHODS if method not in METHODS_WITH_MASKS]
SIZES = [(96, 128), (64, 96)]
ALWAYS = BoxPrompting(probability=1.0, hidden_labels=0.5)


def given(*rows: list[bool]) -> PromptedObjects:
    targets = tiny_targets(3, 3)
    return PromptedObjects(targets.labels, targets.boxes, torch.tensor(rows))


def matched(model, prompt=None) -> Predictions:
    with torch.no_grad():
        return model(tiny_features(2), tiny_padding(SIZES), prompt=prompt).of("match")


@pytest.mark.parametrize("method", NAMES)
def test_matched_queries_see_the_given_objects_of_their_own_image(method):
    """And nothing of slots where none is given."""
    model = tiny_model(method, prompts=ALWAYS)
    alone = matched(model)
    nothing = matched(model, partial(add_prompts, given=given([False] * 3, [False] * 3)))
    torch.testing.assert_close(nothing.logits, alone.logits)
    torch.testing.assert_close(nothing.boxes, alone.boxes)
    told = matched(model, partial(add_prompts, given=given([False] * 3, [False, True, False])))
    torch.testing.assert_close(told.logits[:, 0], alone.logits[:, 0])
    assert (told.logits[-1, 1] - alone.logits[-1, 1]).abs().min(dim=0).values.max() > 1e-6


@pytest.mark.parametrize("method", NAMES)
def test_training_has_finite_losses_under_the_same_names_and_a_gradient_everywhere(method):
    model = tiny_model(method, prompts=ALWAYS, denoising=Denoising(num_groups=2))
    keys = []
    for targets in (tiny_targets(3, 1), tiny_targets(0, 2), tiny_targets(0, 0)):
        losses = tiny_losses(method, model(tiny_features(2), tiny_padding(SIZES), targets), targets)
        assert all(loss.isfinite() for loss in losses.values())
        model.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        keys.append(list(losses))
    assert keys[0] == keys[1] == keys[2]
    assert {"loss_ce_prompt", "loss_bbox_prompt", "loss_ce_dn", "loss_ce"} <= set(keys[0])


def test_who_sees_whom():
    """Two given objects, the second slot empty; two groups of one noised object; two queries."""
    model = tiny_model("dab_deformable", prompts=ALWAYS, denoising=Denoising(num_groups=2))
    is_given = torch.tensor([[True, False]])
    segments = (
        Segment("prompt", 2, attends_to=("match",), is_empty=~is_given),
        Segment("dn", 2, num_groups=2, attends_to=("match",)),
        Segment("match", 2, attends_to=("prompt",), ignored_objects=is_given),
    )
    rows = allowed_pairs(segments, torch.device("cpu"))[0, 0].int().tolist()
    assert rows == [
        [1, 0, 0, 0, 1, 1],
        [1, 1, 0, 0, 1, 1],  # an empty slot, which nobody sees
        [0, 0, 1, 0, 1, 1],
        [0, 0, 0, 1, 1, 1],
        [1, 0, 0, 0, 1, 1],
        [1, 0, 0, 0, 1, 1],
    ]
    found = model(tiny_features(2), tiny_padding(SIZES), tiny_targets(3, 1))
    assert [(s.name, s.attends_to) for s in found.segments] == [
        (s.name, s.attends_to) for s in segments
    ]


@pytest.mark.parametrize(
    ("method", "further", "name"),
    [
        ("dab_deformable", {"num_groups": 3}, "group"),
        ("dino", {"hybrid": HybridMatching(num_queries=5, matches_per_object=2)}, "hybrid"),
    ],
)
def test_further_queries_are_told_nothing(method, further, name):
    """They find all objects, with the predictions that they have where nothing is given."""
    denoising = Denoising(num_groups=2, contrastive=True)
    model = tiny_model(method, prompts=ALWAYS, denoising=denoising, **further)
    targets = tiny_targets(3, 3)
    told = model(tiny_features(2), tiny_padding(SIZES), targets)
    del model.auxiliary[1]
    alone = model(tiny_features(2), tiny_padding(SIZES), targets)
    assert [s.name for s in told.segments] == ["prompt", "dn", "match", name]
    assert (
        told.segment("match").ignored_objects.any() and told.segment(name).ignored_objects is None
    )
    torch.testing.assert_close(told.of(name).boxes, alone.of(name).boxes, rtol=1e-9, atol=1e-9)
    assert (told.of("match").boxes - alone.of("match").boxes).abs().max() > 1e-6


def test_a_query_that_is_matched_with_a_given_object_must_say_nothing():
    model = tiny_model("dab_deformable", prompts=ALWAYS)
    targets = tiny_targets(3, 3)
    rows = ([True, False, True], [False, False, False])
    prompt = partial(add_prompts, given=given(*rows))
    predictions = model(tiny_features(2), tiny_padding(SIZES), prompt=prompt)
    object_of = assign(predictions, targets, Costs())["match"].object_of
    for layer in object_of:
        assert sorted(set(layer[0].tolist())) == [-1, 1]
        assert sorted(set(layer[1].tolist())) == [-1, 0, 1, 2]
    prompts = assign(predictions, targets, Costs())["prompt"]
    assert prompts.object_of[0].tolist() == [[0, -1, 2], [-1, -1, -1]]


def test_what_is_given_follows_from_the_noise_key_alone():
    auxiliary = RandomBoxPrompts(BoxPrompting(probability=1.0, hidden_labels=0.5), num_classes=5)
    target, other = tiny_target(4, key=7), tiny_target(9, key=8)
    alone = auxiliary.choose(pad_targets([target]))
    beside = auxiliary.choose(pad_targets([other, target]))
    for name in ("labels", "boxes", "is_given"):
        assert torch.equal(getattr(alone, name)[0], getattr(beside, name)[1, :4]), name


def test_shares_are_as_asked_and_boxes_are_noised_a_little():
    """2000 images of 4 objects: half of the images, half of their objects given, on average."""
    auxiliary = RandomBoxPrompts(BoxPrompting(hidden_labels=0.25), num_classes=5)
    targets = pad_targets([tiny_target(4, key=key) for key in range(2000)])
    chosen = auxiliary.choose(targets)
    share = chosen.is_given.double().mean(dim=1)
    assert share.mean().item() == pytest.approx(0.25, abs=0.02)
    assert (share > 0).double().mean().item() == pytest.approx(0.5 * 4 / 5, abs=0.03)
    is_hidden = chosen.labels == 5
    assert is_hidden.double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(chosen.labels[~is_hidden], targets.labels[~is_hidden])
    moved = (chosen.boxes - targets.boxes).abs() / targets.boxes[..., 2:].repeat(1, 1, 2)
    assert 0.04 < moved[..., :2].max() <= 0.05 + 1e-9 and 0.09 < moved[..., 2:].max() <= 0.1 + 1e-9


def test_masks_cannot_be_prompted():
    with pytest.raises(ValueError, match="mask2former predicts masks"):
        tiny_model("mask2former", prompts=ALWAYS)
