"""Neck, content, slots and predictor of the single-scale methods on hand-worked cases."""

from __future__ import annotations

import torch

from dn_detr.layers.position_encoding import SinePosition
from dn_detr.layers.query_content import QueryContent, SharedContent
from dn_detr.models.learned_queries import LearnedQueries
from dn_detr.models.neck import Flatten, SingleScaleNeck
from dn_detr.models.prediction_heads import DirectBoxes, Heads
from dn_detr.structures import FeatureMaps, Memory


def content(has_labels=False):
    return QueryContent(channels=8, num_classes=3, has_labels=has_labels, has_indicator=True)


def test_the_neck_takes_the_coarsest_feature():
    neck = SingleScaleNeck(projection=torch.nn.Conv2d(6, 8, kernel_size=1), stride=32)
    features = [torch.randn(1, 4, 8, 12), torch.randn(1, 6, 2, 3)]
    maps = neck(features, torch.zeros(1, 64, 96, dtype=torch.bool))
    torch.testing.assert_close(maps.maps[0], neck.projection(features[1]))
    assert maps.strides == (32,) and maps.padding[0].shape == (1, 2, 3)


def test_a_single_level_has_no_level_embedding():
    position = SinePosition(channels=8, temperature=20.0, cell_offset=0.0)
    flatten = Flatten(position=position, channels=8, num_levels=1)
    padding = torch.zeros(1, 2, 3, dtype=torch.bool)
    memory = flatten(FeatureMaps((torch.randn(1, 8, 2, 3),), (padding,), (32,)))
    assert not list(flatten.parameters())
    torch.testing.assert_close(memory.position, position(padding))


def test_shared_content_is_the_same_for_all_queries_and_differs_by_pattern():
    shared = SharedContent(content=content(has_labels=True), is_learned=True, num_patterns=2)
    rows = torch.arange(6.0).reshape(3, 2)
    made, repeated = shared(rows)
    assert shared.row[0, -1] == 0  # the indicator of matched queries
    expected = torch.cat([(shared.row + pattern).expand(3, -1) for pattern in shared.patterns])
    torch.testing.assert_close(made, expected)
    assert repeated.tolist() == rows.tolist() * 2


def test_content_without_row_and_pattern_is_zero_and_has_no_parameter():
    shared = SharedContent(content=content(), is_learned=False, num_patterns=0)
    made, rows = shared(torch.ones(3, 4))
    assert torch.equal(made, torch.zeros(3, 8)) and rows.shape == (3, 4)
    assert not list(shared.parameters())


class PointOfPosition(torch.nn.Module):
    def forward(self, _content, position):
        return position[..., :2]


def test_a_slot_without_a_point_has_no_reference_and_a_box_is_embedded():
    tokens = torch.zeros(2, 4, 8)
    memory = Memory(tokens, tokens, torch.zeros(2, 4).bool(), ((2, 2),), torch.ones(2, 1, 2))
    boxes = torch.tensor([[[0.5, 0.0, 0.2, 0.3]]]).expand(2, 1, 4)
    labels = torch.zeros(2, 1, dtype=torch.int64)
    for point in (None, PointOfPosition()):
        design = LearnedQueries(
            content=content(has_labels=True),
            num_queries=3,
            has_rows=False,
            point=point,
            epsilon=0.01,
        )
        source = design.bind(memory)
        queries, noised = source.queries(), source.from_boxes(labels, boxes)
        assert torch.equal(queries.state.content, torch.zeros(2, 3, 8))
        torch.testing.assert_close(noised.position, design.box_embedding(boxes))
        assert noised.content[..., -1].tolist() == [[1.0], [1.0]]
        if point is None:
            assert queries.state.reference is None and noised.reference is None
        else:
            expected = design.learned.position[:, :2].sigmoid().expand(2, -1, -1)
            torch.testing.assert_close(queries.state.reference, expected)
            torch.testing.assert_close(noised.reference[0, 0], torch.tensor([0.5, 0.01 / 1.01]))


def test_absolute_boxes_are_what_the_head_says():
    heads = Heads(channels=8, num_classes=3, num_layers=2, shared=True)
    torch.nn.init.normal_(heads.box_heads[0].layers[-1].weight)
    predictor = DirectBoxes(heads=heads, norm=torch.nn.LayerNorm(8))
    made = torch.randn(1, 4, 8)
    step = predictor(0, made, predictor.start(made, None))
    normed = predictor.norm(made)
    torch.testing.assert_close(step.boxes, heads.box_heads[0](normed).sigmoid())
    torch.testing.assert_close(step.logits, heads.class_heads[0](normed))
    assert step.reference is None and step.base is None
