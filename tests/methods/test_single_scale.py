"""What the single-scale methods promise beyond what all methods do."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_features, tiny_model, tiny_padding, tiny_targets

from dn_detr.build import Denoising, LossConfig
from dn_detr.losses.matcher import Costs, assign
from dn_detr.methods.anchor_detr import AxisPosition
from dn_detr.methods.smca import gaussian
from dn_detr.models.postprocess import postprocess
from dn_detr.models.query_positions import SMALLEST_SIDE, ModulatedBoxPosition
from dn_detr.structures import Memory, Predictions, Segment

SIZES = [(96, 128), (64, 96)]


@pytest.mark.parametrize("method", ["dab_detr", "anchor_detr"])
@pytest.mark.parametrize("shares_content", [False, True])
def test_every_pattern_asks_every_query(method, shares_content):
    model = tiny_model(method, num_patterns=3, shares_content=shares_content)
    predictions = model(tiny_features(2), tiny_padding(SIZES))
    assert predictions.logits.shape == (3, 2, 21, 5)
    first = predictions.references[0].unflatten(1, (3, 7))
    assert torch.equal(first[:, 0], first[:, 1]) and torch.equal(first[:, 0], first[:, 2])
    logits = predictions.logits[0].unflatten(1, (3, 7))
    assert (logits[:, 0] - logits[:, 1]).abs().min() > 0


def test_patterns_and_groups_and_denoising_go_together():
    model = tiny_model(
        "dab_detr", num_patterns=2, shares_content=True, denoising=Denoising(), num_groups=3
    )
    targets = tiny_targets(2, 3)
    predictions = model(tiny_features(2), tiny_padding(SIZES), targets)
    assert predictions.of("match").logits.shape[2] == 14
    assert predictions.segment("group").size == 28
    losses = LossConfig().criterion()(
        predictions, targets, assign(predictions, targets, Costs()), sum(targets.counts)
    )
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_model_that_shares_content_loads_a_denoised_one_and_predicts_the_same():
    """DN-DETR's content of matched queries is no part of the label table."""
    denoised = tiny_model("dab_detr", denoising=Denoising(), shares_content=True)
    denoised.query_design.shared.row.data[:, -1] = 0  # the indicator, as in a trained checkpoint
    plain = tiny_model("dab_detr", shares_content=True, seed=5)
    missing, unexpected = plain.load_state_dict(denoised.state_dict(), strict=False)
    assert not missing
    assert unexpected == ["query_design.content.label_embedding.weight"]
    inputs = tiny_features(2), tiny_padding(SIZES)
    torch.testing.assert_close(plain(*inputs).boxes, denoised(*inputs).boxes)


def test_a_softmax_over_no_object_needs_one_logit_more():
    model = tiny_model("detr", has_no_object=True)
    targets = tiny_targets(2, 3)
    predictions = model(tiny_features(2), tiny_padding(SIZES), targets)
    assert predictions.logits.shape == (3, 2, 7, 6)
    assignments = assign(predictions, targets, Costs(class_cost=1, kind="softmax"))
    losses = LossConfig(kind="softmax").criterion()(predictions, targets, assignments, 5)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="must be one of .* got 'other'"):
        LossConfig(kind="other")


def test_with_no_object_each_query_speaks_for_its_best_class_alone():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [0.0, 0.5, 0.0]])[None, None]
    boxes = torch.full((1, 1, 3, 4), 0.5)
    predictions = Predictions(logits, boxes, (None,), (Segment("match", 3),))
    (found,) = postprocess(predictions, [(10, 10)], 300, has_no_object=True)
    shares = logits[0, 0].softmax(-1)
    torch.testing.assert_close(found.scores, shares[[0, 2, 1], [0, 1, 1]])
    assert found.labels.tolist() == [0, 1, 1]


def test_modulation_asks_for_narrow_boxes_in_proportion_to_their_size():
    """2201.12329, sec. 4.4: x counts by wanted width over width, y by wanted height over height."""
    position = ModulatedBoxPosition(channels=16).double()
    content = torch.zeros(1, 2, 16, dtype=torch.float64)
    boxes = torch.tensor([[[0.3, 0.6, 0.5, 0.5], [0.3, 0.6, 0.25, 0.5]]], dtype=torch.float64)
    _, place = position(0, content, boxes, None, None)
    y, x = place.spatial.chunk(2, dim=-1)
    torch.testing.assert_close(x[:, 1], 2 * x[:, 0])
    torch.testing.assert_close(y[:, 1], y[:, 0])
    boxes[..., 2:] = 0
    _, place = position(0, content, boxes, None, None)
    assert place.spatial.abs().max() <= 1 / SMALLEST_SIDE


def test_the_gaussian_is_that_of_a_loop():
    centre, scale = torch.randn(1, 2, 3, 2).double() * 2, torch.randn(1, 2, 3, 2).double()
    found = gaussian(centre, scale, 2, 4).unflatten(-1, (2, 4))
    for query in range(2):
        for head in range(3):
            for y in range(2):
                for x in range(4):
                    dx, dy = (centre[0, query, head] - torch.tensor([x, y])).tolist()
                    sx, sy = scale[0, query, head].tolist()
                    expected = -((dx * sx) ** 2 + (dy * sy) ** 2) / 8
                    assert abs(found[0, head, query, y, x].item() - expected) < 1e-9


def test_columns_and_rows_lie_at_the_centres_of_unpadded_cells():
    axis = AxisPosition(channels=8).double()
    tokens = torch.zeros(1, 6, 8, dtype=torch.float64)
    memory = Memory(
        tokens, tokens, torch.zeros(1, 6).bool(), ((2, 3),), torch.tensor([[[2.0, 1.0]]]).double()
    )
    columns, rows = axis.of_map(memory)
    at = torch.tensor([0.25, 0.75, 0.75], dtype=torch.float64)  # padding repeats the last
    torch.testing.assert_close(columns[0], axis(at, torch.float64))
    torch.testing.assert_close(rows[0], axis(torch.tensor([0.5, 0.5]).double(), torch.float64))


def test_denoising_noises_anchor_points_by_the_centre_alone():
    model = tiny_model("anchor_detr", denoising=Denoising(num_groups=2))
    predictions = model(tiny_features(2), tiny_padding(SIZES), tiny_targets(2, 3))
    assert predictions.of("dn").references[0].shape[-1] == 2
