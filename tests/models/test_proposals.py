"""Two-stage queries: which tokens propose, and which proposals become queries."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_features, tiny_model, tiny_padding, tiny_targets, without_group_norm

from dn_detr.build import Denoising, LossConfig
from dn_detr.layers.query_attention import additive, allowed_pairs
from dn_detr.layers.query_content import QueryContent
from dn_detr.losses.matcher import Costs, assign
from dn_detr.methods import METHODS as ALL_METHODS
from dn_detr.models.proposals import (
    ProposalHead,
    ProposalQueries,
    Proposals,
    best_tokens,
    token_boxes,
)
from dn_detr.structures import Memory

METHODS = ("deformable_detr_two_stage", "dino", "h_deformable")


def memory_of(shapes, valid, channels=16):
    """Random memory of one image with (w, h) valid cells in each level."""
    padding = []
    for (height, width), (valid_width, valid_height) in zip(shapes, valid, strict=True):
        is_padding = torch.ones(height, width, dtype=torch.bool)
        is_padding[:valid_height, :valid_width] = False
        padding.append(is_padding.flatten())
    padding = torch.cat(padding)[None]
    tokens = torch.randn(1, padding.shape[1], channels)
    sizes = torch.tensor(valid, dtype=torch.float32)[None]
    return Memory(tokens, torch.zeros_like(tokens), padding, shapes, sizes)


def test_a_token_proposes_a_square_around_its_place_that_doubles_with_the_level():
    boxes = token_boxes(memory_of(((2, 4), (1, 2)), ((4, 2), (2, 1))), (0, 1))[0][0]
    assert boxes.shape == (10, 4)
    torch.testing.assert_close(boxes[0], torch.tensor([0.125, 0.25, 0.05, 0.05]))
    torch.testing.assert_close(boxes[7], torch.tensor([0.875, 0.75, 0.05, 0.05]))
    torch.testing.assert_close(boxes[9], torch.tensor([0.75, 0.5, 0.1, 0.1]))


def test_tokens_of_padding_and_at_the_border_propose_nothing():
    memory = memory_of(((2, 4), (1, 100)), ((3, 2), (100, 1)))
    proposals = ProposalHead(channels=16, num_classes=3)(memory)
    expected = torch.tensor([False, False, False, True] * 2 + [True] + [False] * 98 + [True])
    assert torch.equal(proposals.is_empty[0], expected)  # centres .005 and .995 lie at the border
    assert (proposals.boxes[0, expected] == 0.5).all()
    torch.testing.assert_close(  # heads start without an offset
        proposals.boxes[0, ~expected], token_boxes(memory, (0, 1))[0][0, ~expected]
    )


def test_best_tokens_go_by_score_and_empty_ones_come_last():
    scores = torch.tensor([[1.0, 5.0, 3.0, 9.0]])
    is_empty = torch.tensor([[False, False, False, True]])
    index, empty = best_tokens(scores, is_empty, 0, 2)
    assert index.tolist() == [[1, 2]] and empty.tolist() == [[False, False]]
    index, empty = best_tokens(scores, is_empty, 1, 4)
    assert index[0, :2].tolist() == [2, 0]
    assert empty.tolist() == [[False, False, True, True]]
    assert (index < 4).all()


@pytest.mark.parametrize(("is_class_agnostic", "expected"), [(False, [1, 0]), (True, [0, 2])])
def test_tokens_are_ranked_by_their_best_class_or_by_class_0_alone(is_class_agnostic, expected):
    design = ProposalQueries(
        content=QueryContent(channels=16, num_classes=2, has_labels=False, has_indicator=False),
        num_queries=2,
        transform=None,
        has_rows=True,
        is_class_agnostic=is_class_agnostic,
        has_no_object=False,
        epsilon=1e-3,
    )
    source = design.bind(memory_of(((1, 3),), ((3, 1),)))
    boxes = torch.rand(1, 3, 4)
    source.proposals = Proposals(
        logits=torch.tensor([[[5.0, -9.0], [-8.0, 6.0], [1.0, 1.0]]]),
        boxes=boxes,
        is_empty=torch.zeros(1, 3, dtype=torch.bool),
    )
    assert torch.equal(source.queries().state.reference, boxes[:, expected])


@pytest.mark.parametrize("method", METHODS)
def test_denoising_sees_no_empty_queries(method):
    """Its ready mask is the one that follows from the segments, here too."""
    model = tiny_model(method, num_levels=3, denoising=Denoising(num_groups=2))
    kept = []
    model.auxiliary.append(Keep(kept))
    model(tiny_features(2, 32, 32), tiny_padding([(32, 32), (16, 16)], 32, 32), tiny_targets(2, 1))
    (queries,) = kept
    assert queries.segments[1].is_empty.any()
    allowed = allowed_pairs(queries.segments, torch.device("cpu"))
    assert torch.equal(queries.mask, additive(allowed, torch.float64))


class Keep(torch.nn.Module):
    """An auxiliary that keeps the queries as they are."""

    def __init__(self, kept: list):
        super().__init__()
        self.kept = kept

    def forward(self, queries, _source, _targets):
        self.kept.append(queries)
        return queries


@pytest.mark.parametrize("method", METHODS)
def test_fewer_tokens_than_queries_leave_queries_empty(method):
    """The second image has 4 + 1 tokens for 7 queries; on the canvas there are more."""
    model = tiny_model(method, num_levels=3)
    sizes = [(32, 32), (16, 16)]
    features = tiny_features(2, 32, 32)
    targets = tiny_targets(2, 1)
    predictions = model(features, tiny_padding(sizes, 32, 32), targets)
    is_empty = predictions.segment("match").is_empty
    valid = [16 + 4 + 1, 4 + 1 + 1]
    assert is_empty.sum(1).tolist() == [max(0, 7 - count) for count in valid]
    assignments = assign(predictions, targets, Costs())
    assert (assignments["match"].object_of[:, is_empty] == -1).all()
    losses = LossConfig().criterion()(predictions, targets, assignments, 3.0)
    assert all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize("method", METHODS)
def test_fewer_tokens_on_the_canvas_than_queries(method):
    model = without_group_norm(tiny_model(method, num_levels=3))
    predictions = model(tiny_features(1, 32, 32), tiny_padding([(32, 32)], 32, 32))
    assert predictions.logits.shape == (3, 1, 7, 5)
    model.query_design.learned.num_queries = 30
    if model.query_design.learned.content is not None:
        model.query_design.learned.content.data = torch.zeros(30, 32, dtype=torch.float64)
    more = model(tiny_features(1, 32, 32), tiny_padding([(32, 32)], 32, 32))
    assert more.logits.shape == (3, 1, 30, 5) and more.logits.isfinite().all()
    assert more.segment("match").is_empty.sum().item() == 30 - 21


@pytest.mark.parametrize("method", METHODS)
def test_decoder_losses_give_the_proposal_head_no_gradient(method):
    """Chosen boxes are detached; the head learns from the loss of the proposals alone."""
    model = tiny_model(method)
    predictions = model(tiny_features(2), tiny_padding([(96, 128), (64, 96)]))
    (predictions.logits.sum() + predictions.boxes.sum()).backward()
    assert all(p.grad is None for p in model.query_design.learned.head.parameters())


def test_dino_trains_the_chosen_proposals_and_deformable_detr_all_of_them():
    inputs = tiny_features(2), tiny_padding([(96, 128), (64, 96)])
    chosen = tiny_model("dino")(*inputs)
    assert chosen.proposals.logits.shape == (1, 2, 7, 5)
    assert not chosen.proposals.is_class_agnostic
    torch.testing.assert_close(chosen.proposals.boxes[0], chosen.references[0])
    every = tiny_model("deformable_detr_two_stage")(*inputs)
    assert every.proposals.logits.shape[2] == 12 * 16 + 6 * 8 + 3 * 4 + 2 * 2
    assert every.proposals.is_class_agnostic


@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_logit_for_no_object_is_refused_where_tokens_are_ranked_and_only_there(method):
    """With LOSS.KIND softmax; Mask DINO was built and ranked by the logit for no object."""
    inputs = tiny_features(2), tiny_padding([(96, 128), (64, 96)])
    if tiny_model(method)(*inputs).proposals is not None:
        with pytest.raises(ValueError, match="ranked by sigmoid scores"):
            tiny_model(method, has_no_object=True)
    else:
        predictions = tiny_model(method, has_no_object=True)(*inputs)
        assert predictions.logits.shape[-1] == 6 and predictions.proposals is None
