"""The five properties that every training assist keeps, for every method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import (
    tiny_features,
    tiny_model,
    tiny_padding,
    tiny_target,
    tiny_targets,
    without_group_norm,
)

from dn_detr.build import Denoising
from dn_detr.methods import METHODS
from dn_detr.structures import Queries, pad_targets

ASSISTS = {
    "denoising": Denoising(num_groups=3),
    "budget": Denoising(num_groups=0, max_objects=9),
}
SIZES = [(96, 128), (64, 96)]

pytestmark = [
    pytest.mark.parametrize("method", METHODS),
    pytest.mark.parametrize("assist", ASSISTS),
]


class ContentProbe(torch.nn.Module):
    """An assist that swaps the content for a leaf tensor, to ask for gradients; `edit` may change
    the state before."""

    def __init__(self, edit=None):
        super().__init__()
        self.edit = edit

    def forward(self, queries, source, targets):
        state = queries.state if self.edit is None else self.edit(queries)
        self.queries = queries
        self.content = state.content.detach().requires_grad_()
        self.segments = queries.segments
        state = replace(state, content=self.content)
        return Queries(state, queries.segments, queries.proposals, queries.mask)


def forward(method, assist, targets, *, edit=None, sizes=SIZES):
    model = tiny_model(method, denoising=ASSISTS[assist])
    probe = ContentProbe(edit)
    model.assists.append(probe)
    predictions = model(tiny_features(len(sizes)), tiny_padding(sizes), targets)
    return predictions, probe


def test_no_gradient_flows_from_matched_predictions_to_denoising_slots(method, assist):
    predictions, probe = forward(method, assist, tiny_targets(2, 3))
    matched = predictions.of("match")
    total = matched.logits.sum() + matched.boxes.sum()
    (gradient,) = torch.autograd.grad(total, probe.content)
    size = predictions.segment("denoise").size
    assert torch.equal(gradient[:, :size], torch.zeros_like(gradient[:, :size]))
    assert gradient[:, size:].abs().max() > 0


def test_denoising_groups_do_not_see_each_other(method, assist):
    predictions, probe = forward(method, assist, tiny_targets(2, 3))
    segment = predictions.segment("denoise")
    per_group = segment.size // segment.num_groups
    first = predictions.of("denoise").logits[:, :, :per_group].sum()
    (gradient,) = torch.autograd.grad(first, probe.content)
    others = gradient[:, per_group : segment.size]
    assert segment.num_groups > 1
    assert torch.equal(others, torch.zeros_like(others))
    assert gradient[:, :per_group].abs().max() > 0


def test_matched_predictions_are_those_of_the_plain_model(method, assist):
    targets = tiny_targets(2, 3)
    model = tiny_model(method, denoising=ASSISTS[assist])
    features, padding = tiny_features(2), tiny_padding(SIZES)
    with_assist = model(features, padding, targets).of("match")
    without = model(features, padding)
    torch.testing.assert_close(with_assist.logits, without.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(with_assist.boxes, without.boxes, rtol=1e-9, atol=1e-9)


def test_scribbling_on_empty_slots_changes_nothing(method, assist):
    def scribble(queries):
        is_empty = queries.segments[0].is_empty
        assert is_empty.any()
        noise = torch.randn_like(queries.state.content[:, : is_empty.shape[1]]) * 100
        content = queries.state.content.clone()
        content[:, : is_empty.shape[1]][is_empty] = noise[is_empty]
        return replace(queries.state, content=content)

    targets = tiny_targets(1, 3)
    plain, probe = forward(method, assist, targets)
    scribbled, _ = forward(method, assist, targets, edit=scribble)
    is_empty = probe.segments[0].is_empty
    exists = torch.cat(
        (~is_empty, torch.ones(2, plain.segment("match").size, dtype=torch.bool)), dim=1
    )
    for name in ("logits", "boxes"):
        before, after = getattr(plain, name), getattr(scribbled, name)
        torch.testing.assert_close(before[:, exists], after[:, exists], rtol=1e-12, atol=1e-12)


def test_an_image_alone_gives_the_result_it_has_in_a_batch(method, assist):
    """From the feature maps on, that is without what reads across borders, and with equal groups."""
    if assist == "budget":
        pytest.skip("the number of groups follows from the fullest image of the batch")
    model = tiny_model(method, denoising=ASSISTS[assist], num_levels=3)
    without_group_norm(model)
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
    for name in ("logits", "boxes"):
        torch.testing.assert_close(
            getattr(together.of("match"), name)[:, 1:],
            getattr(alone.of("match"), name),
            rtol=1e-9,
            atol=1e-9,
        )
        groups = together.segment("denoise").num_groups
        batched = getattr(together.of("denoise"), name)[:, 1:].unflatten(2, (groups, -1))
        single = getattr(alone.of("denoise"), name).unflatten(2, (groups, -1))
        torch.testing.assert_close(batched[:, :, :, :2], single, rtol=1e-9, atol=1e-9)


def test_the_ready_mask_is_the_one_that_follows_from_the_segments(method, assist):
    from dn_detr.layers.attend import additive, allowed_pairs

    _, probe = forward(method, assist, tiny_targets(1, 3))
    if probe.queries.mask is None:
        pytest.skip("queries that may be empty have no ready mask")
    allowed = allowed_pairs(probe.segments, torch.device("cpu"))
    assert torch.equal(probe.queries.mask, additive(allowed, torch.float64))
