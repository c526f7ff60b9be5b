"""Neck, encoder, predictor and postprocessing on hand-worked cases."""

from __future__ import annotations

import pytest
import torch

from dn_detr.layers.position_encoding import SinePosition, sine_of_reference
from dn_detr.models.encoder import token_centers
from dn_detr.models.neck import Flatten, MultiScaleNeck, resize_padding
from dn_detr.models.postprocess import postprocess
from dn_detr.models.prediction_heads import Heads, IterativeRefinement, refine_box
from dn_detr.structures import FeatureMaps, LayerOutput, Predictions, Segment


def test_neck_adds_coarser_levels_from_the_last_feature():
    neck = MultiScaleNeck(in_channels=[4, 8], strides=[8, 16], channels=16, num_levels=4)
    features = [torch.randn(1, 4, 12, 16), torch.randn(1, 8, 6, 8)]
    maps = neck(features, torch.zeros(1, 96, 128, dtype=torch.bool))
    assert [tuple(m.shape[-2:]) for m in maps.maps] == [(12, 16), (6, 8), (3, 4), (2, 2)]
    assert maps.strides == (8, 16, 32, 64)
    expected = neck.levels[2](features[1])
    torch.testing.assert_close(maps.maps[2], expected)
    torch.testing.assert_close(maps.maps[3], neck.levels[3](expected))


def test_neck_refuses_fewer_levels_than_features():
    with pytest.raises(ValueError, match="number of backbone features 2"):
        MultiScaleNeck(in_channels=[4, 8], strides=[8, 16], channels=16, num_levels=1)


def test_padding_of_a_map_is_that_of_its_nearest_pixels():
    padding = torch.zeros(1, 8, 8, dtype=torch.bool)
    padding[:, 5:] = True
    # Row i of 4 reads row 2 i of 8: rows 0, 2, 4, 6, of which only row 6 lies in the padding.
    expected = torch.tensor([False, False, False, True])[:, None].expand(4, 2)
    assert torch.equal(resize_padding(padding, 4, 2)[0], expected)


def test_tokens_lie_at_cell_centres_of_the_unpadded_part():
    padding = torch.zeros(1, 2, 4, dtype=torch.bool)
    padding[:, :, 2:] = True
    flatten = Flatten(
        position=SinePosition(channels=8, temperature=20.0, cell_offset=0.0),
        channels=8,
        num_levels=1,
    )
    memory = flatten(FeatureMaps((torch.zeros(1, 8, 2, 4),), (padding,), (8,)))
    assert memory.valid_sizes.tolist() == [[[2.0, 2.0]]]
    centers = token_centers(memory).reshape(2, 4, 2)
    assert centers[0, :, 0].tolist() == [0.25, 0.75, 1.25, 1.75]
    assert centers[:, 0, 1].tolist() == [0.25, 0.75]


def test_positions_do_not_depend_on_padding():
    position = SinePosition(channels=8, temperature=10000.0, cell_offset=-0.5)
    alone = position(torch.zeros(1, 3, 4, dtype=torch.bool))
    padding = torch.ones(1, 5, 7, dtype=torch.bool)
    padding[:, :3, :4] = False
    inside = position(padding).view(1, 5, 7, 8)[:, :3, :4].flatten(1, 2)
    torch.testing.assert_close(inside, alone)


def test_sine_of_a_box_is_ordered_y_x_w_h():
    box = torch.tensor([0.1, 0.2, 0.3, 0.4])
    encoded = sine_of_reference(box, channels=2)
    angle = 2 * torch.pi * box[[1, 0, 2, 3]]
    expected = torch.stack((angle.sin(), angle.cos()), dim=1).flatten()
    torch.testing.assert_close(encoded, expected)


def test_move_adds_logits_and_lets_a_point_have_any_size():
    box = torch.tensor([0.5, 0.25, 0.2, 0.8])
    torch.testing.assert_close(refine_box(box, torch.zeros(4), 1e-3), box)
    delta = torch.tensor([1.0, 0.0, -2.0, 3.0])
    moved = refine_box(box[:2], delta, 1e-3)
    expected = torch.stack((delta[0].sigmoid(), box[1], delta[2].sigmoid(), delta[3].sigmoid()))
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("forward_twice", [False, True])
def test_gradient_reaches_the_last_layers_move_only_when_looking_forward_twice(forward_twice):
    heads = Heads(channels=8, num_classes=2, num_layers=2, shared=True)
    for parameter in heads.parameters():
        parameter.data.normal_()
    predictor = IterativeRefinement(
        heads=heads, norm=torch.nn.LayerNorm(8), looks_forward_twice=forward_twice, epsilon=1e-3
    )
    first = torch.randn(1, 3, 8, requires_grad=True)
    step = predictor.start(first, torch.rand(1, 3, 4))
    step = predictor(0, first, step)
    assert not step.reference.requires_grad
    step = predictor(1, torch.randn(1, 3, 8), step)
    (gradient,) = torch.autograd.grad(step.boxes.sum(), first, allow_unused=True)
    assert (gradient is not None) == forward_twice


def test_with_a_norm_the_reference_moves_by_what_the_heads_say_without_it():
    heads = Heads(channels=8, num_classes=2, num_layers=1, shared=True)
    for parameter in heads.parameters():
        parameter.data.normal_()
    norm = torch.nn.LayerNorm(8)
    predictor = IterativeRefinement(heads=heads, norm=norm, looks_forward_twice=True, epsilon=1e-3)
    content, reference, base = torch.randn(1, 3, 8), torch.rand(1, 3, 4), torch.rand(1, 3, 4)
    step = predictor(0, content, LayerOutput(None, None, reference, base))
    normed, raw = (heads.box_heads[0](x) for x in (norm(content), content))
    torch.testing.assert_close(step.boxes, refine_box(base, normed, 1e-3))
    torch.testing.assert_close(step.reference, refine_box(reference, raw, 1e-3))
    torch.testing.assert_close(step.logits, heads.class_heads[0](norm(content)))


def test_without_a_norm_the_predicted_box_is_the_next_reference():
    heads = Heads(channels=8, num_classes=2, num_layers=1, shared=False)
    for parameter in heads.parameters():
        parameter.data.normal_()
    predictor = IterativeRefinement(heads=heads, norm=None, looks_forward_twice=False, epsilon=1e-3)
    content, reference = torch.randn(1, 3, 8), torch.rand(1, 3, 4)
    step = predictor(0, content, LayerOutput(None, None, reference, reference))
    assert torch.equal(step.boxes, step.reference)


def test_detections_are_the_best_query_and_class_pairs_in_pixels():
    logits = torch.full((1, 1, 2, 3), -5.0)
    logits[0, 0, 1, 2], logits[0, 0, 0, 0] = 3.0, 1.0
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.5, 0.4, 1.0]])[None, None]
    predictions = Predictions(logits, boxes, (None,), (Segment("match", 2),))
    (found,) = postprocess(predictions, [(100, 200)], top_k=2)
    assert found.labels.tolist() == [2, 0]
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 1.0]).sigmoid())
    expected = torch.tensor([[0.0, 0.0, 60.0, 100.0], [50.0, 25.0, 150.0, 75.0]])
    torch.testing.assert_close(found.boxes_xyxy_px, expected)


def test_more_detections_than_there_are_are_not_asked_for():
    predictions = Predictions(
        torch.zeros(1, 1, 2, 3), torch.rand(1, 1, 2, 4), (None,), (Segment("match", 2),)
    )
    assert len(postprocess(predictions, [(10, 10)], top_k=300)[0].scores) == 6
