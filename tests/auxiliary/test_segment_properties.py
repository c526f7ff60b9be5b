"""The five properties that every training auxiliary keeps, for every method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import (
    AUXILIARY,
    levels_of_features,
    outputs_of,
    tiny_features,
    tiny_model,
    tiny_padding,
    tiny_target,
    tiny_targets,
    without_group_norm,
)

from dn_detr.layers.query_attention import additive, allowed_pairs
from dn_detr.methods import METHODS
from dn_detr.structures import Queries, pad_targets

SIZES = [(96, 128), (64, 96)]

pytestmark = [
    pytest.mark.parametrize("method", METHODS),
    pytest.mark.parametrize("auxiliary", AUXILIARY),
]


class ContentProbe(torch.nn.Module):
    """Auxiliary queries whose content becomes a leaf tensor, for gradients; `edit` may change
    the state before."""

    def __init__(self, edit=None):
        super().__init__()
        self.edit = edit

    def forward(self, queries, _source, _targets):
        state = queries.state if self.edit is None else self.edit(queries)
        self.queries = queries
        self.content = state.content.detach().requires_grad_()
        self.segments = queries.segments
        state = replace(state, content=self.content)
        return Queries(state, queries.segments, queries.proposals, queries.mask)


def forward(method, auxiliary, targets, *, edit=None, sizes=SIZES):
    model = tiny_model(method, **AUXILIARY[auxiliary])
    probe = ContentProbe(edit)
    model.auxiliary.append(probe)
    predictions = model(tiny_features(len(sizes)), tiny_padding(sizes), targets)
    return predictions, probe


def slots_of(predictions):
    """Name of each segment -> its slots."""
    ranges, start = {}, 0
    for segment in predictions.segments:
        ranges[segment.name] = slice(start, start + segment.size)
        start += segment.size
    return ranges


def existing(segments):
    """[B, Q] bool: the slots that are not empty."""
    batch = len(SIZES)
    return torch.cat(
        [
            torch.ones(batch, s.size, dtype=torch.bool) if s.is_empty is None else ~s.is_empty
            for s in segments
        ],
        dim=1,
    )


def test_no_gradient_flows_from_matched_predictions_to_other_slots(method, auxiliary):
    predictions, probe = forward(method, auxiliary, tiny_targets(2, 3))
    total = sum(value.sum() for value in outputs_of(predictions.of("match")).values())
    (gradient,) = torch.autograd.grad(total, probe.content)
    slots = slots_of(predictions)
    for name, where in slots.items():
        assert (name == "match") == (gradient[:, where].abs().max() > 0).item()


def test_a_group_sees_only_itself_and_what_its_segment_says(method, auxiliary):
    predictions, probe = forward(method, auxiliary, tiny_targets(2, 3))
    slots = slots_of(predictions)
    for segment in predictions.segments:
        part = predictions.of(segment.name)
        per_group = segment.size // segment.num_groups
        total = sum(value[:, :, :per_group].sum() for value in outputs_of(part).values())
        (gradient,) = torch.autograd.grad(total, probe.content, retain_graph=True)
        start = slots[segment.name].start
        assert gradient[:, start : start + per_group].abs().max() > 0
        gradient[:, start : start + per_group] = 0
        for name in segment.attends_to:
            assert gradient[:, slots[name]].abs().max() > 0
            gradient[:, slots[name]] = 0
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_matched_predictions_are_those_of_the_plain_model(method, auxiliary):
    targets = tiny_targets(2, 3)
    model = tiny_model(method, **AUXILIARY[auxiliary])
    features, padding = tiny_features(2), tiny_padding(SIZES)
    with_auxiliary = model(features, padding, targets).of("match")
    without = model(features, padding)
    for name, value in outputs_of(with_auxiliary).items():
        torch.testing.assert_close(value, outputs_of(without)[name], rtol=1e-9, atol=1e-9)


def test_scribbling_on_empty_slots_changes_nothing(method, auxiliary):
    def scribble(queries):
        exists = existing(queries.segments)
        noise = torch.randn_like(queries.state.content) * 100
        content = torch.where(exists[..., None], queries.state.content, noise)
        return replace(queries.state, content=content)

    targets = tiny_targets(1, 3)
    plain, probe = forward(method, auxiliary, targets)
    scribbled, _ = forward(method, auxiliary, targets, edit=scribble)
    exists = existing(probe.segments)
    if "dn" not in slots_of(plain):
        pytest.skip("only denoising leaves slots empty here")
    assert not exists.all()
    for name, before in outputs_of(plain).items():
        after = outputs_of(scribbled)[name]
        torch.testing.assert_close(before[:, exists], after[:, exists], rtol=1e-12, atol=1e-12)


def test_an_image_alone_gives_the_result_it_has_in_a_batch(method, auxiliary):
    """From the feature maps on: without what reads across borders, and with equal groups."""
    if auxiliary == "budget":
        pytest.skip("the number of groups follows from the fullest image of the batch")
    model = without_group_norm(
        tiny_model(method, **AUXILIARY[auxiliary], num_levels=levels_of_features(method))
    )
    small = tiny_target(2, key=7)
    targets = pad_targets([tiny_target(3, key=6), small])
    features = [feature.clone() for feature in tiny_features(2)]
    for stride, feature in zip((8, 16, 32), features, strict=True):
        feature[1, :, 64 // stride :] = 5.0
        feature[1, :, :, 96 // stride :] = 5.0
    together = model(features, tiny_padding(SIZES), targets)
    alone = model(
        [f[1:, :, : 64 // s, : 96 // s] for s, f in zip((8, 16, 32), features, strict=True)],
        tiny_padding(SIZES[1:], 64, 96),
        pad_targets([small]),
    )
    for segment in together.segments:
        for name, single in outputs_of(alone.of(segment.name)).items():
            batched = outputs_of(together.of(segment.name))[name][:, 1:]
            if segment.name == "dn":  # the fuller image has 3 slots where this one fills 2
                batched = batched.unflatten(2, (-1, 3))[:, :, :, :2].flatten(2, 3)
            torch.testing.assert_close(batched, single, rtol=1e-9, atol=1e-9)


def test_the_ready_mask_is_the_one_that_follows_from_the_segments(method, auxiliary):
    _, probe = forward(method, auxiliary, tiny_targets(1, 3))
    if probe.queries.mask is None:
        pytest.skip("without denoising there is no ready mask")
    seen = [s for s in probe.segments if s.name in ("dn", "match")]
    allowed = allowed_pairs(tuple(seen), torch.device("cpu"))
    assert torch.equal(probe.queries.mask, additive(allowed, torch.float64))
