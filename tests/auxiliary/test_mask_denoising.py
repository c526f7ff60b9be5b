"""Shifted masks as denoising queries: each is that of its object, moved as its box is."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_features, tiny_model, tiny_padding, tiny_target

from dn_detr.auxiliary.denoising import DenoisingQueries
from dn_detr.build import Denoising
from dn_detr.structures import QueryState, pad_targets

SIZES = [(768, 1024), (512, 768)]
CANVAS = SIZES[0]
"""Large enough for a coarsest level that tells masks apart."""


class Probe(torch.nn.Module):
    """An auxiliary that keeps what it is given."""

    def forward(self, queries, source, _targets):
        self.queries, self.memory = queries, source.memory
        return queries


class Boxes:
    """A source whose queries are the noised boxes themselves."""

    def from_boxes(self, labels, boxes):
        return QueryState(torch.zeros(*labels.shape, 1, dtype=boxes.dtype), None, boxes)


def noised_boxes(queries, targets, box_noise):
    """What box denoising makes of the same keys: [B, T, 4]."""
    auxiliary = DenoisingQueries(
        Denoising(num_groups=3, box_noise=box_noise, label_noise=0.0), num_classes=5
    )
    content = queries.state.content[:, -7:, :1]
    state = QueryState(content, None, torch.zeros(*content.shape[:2], 4, dtype=content.dtype))
    (match,) = (segment for segment in queries.segments if segment.name == "match")
    return auxiliary(type(queries)(state, (match,)), Boxes(), targets).state.reference[:, :-7]


@pytest.mark.parametrize("box_noise", [0.0, 0.8])
def test_a_query_looks_where_the_mask_of_its_object_was_moved_to(box_noise):
    denoising = Denoising(num_groups=3, box_noise=box_noise, label_noise=0.0)
    model = tiny_model("mask2former", denoising=denoising)
    model.auxiliary.append(Probe())
    targets = pad_targets([tiny_target(2, key=4), tiny_target(3, key=5)])
    model(tiny_features(2, *CANVAS), tiny_padding(SIZES, *CANVAS), targets)
    probe = model.auxiliary[1]
    segment, state, memory = probe.queries.segments[0], probe.queries.state, probe.memory
    boxes = noised_boxes(probe.queries, targets, box_noise)
    height, width = memory.shapes[-1]
    assert (height, width) == (6, 8)
    num_moved = 0
    for image, slot in torch.cartesian_prod(torch.arange(2), torch.arange(9)).tolist():
        seen = state.reference[image, slot].unflatten(0, (height, width)) > 0
        if segment.is_empty[image, slot]:
            continue
        instance = segment.assignment[image, slot]
        label = targets.labels[image, instance]
        content = model.query_design.content.label_embedding.weight[label]
        torch.testing.assert_close(state.content[image, slot], content)
        shift = boxes[image, slot, :2] - targets.boxes[image, instance, :2]
        num_moved += bool(shift.abs().max() > 0.01)
        mask = targets.masks[image][instance]
        expected = torch.zeros(height, width, dtype=torch.bool)
        valid_width, valid_height = memory.valid_sizes[image, -1].tolist()
        for row in range(4 * height):
            for column in range(4 * width):
                x = (column + 0.5) / 4 / valid_width - shift[0]
                y = (row + 0.5) / 4 / valid_height - shift[1]
                if 0 <= x < 1 and 0 <= y < 1:
                    hit = mask[int(y * mask.shape[0]), int(x * mask.shape[1])]
                    expected[row // 4, column // 4] |= hit
        assert torch.equal(seen, expected)
    assert (num_moved > 5) == (box_noise > 0)
    assert not state.position[:, :9].any()


def test_targets_without_masks_are_refused():
    model = tiny_model("mask2former", denoising=Denoising(num_groups=3))
    target = tiny_target(2)
    bare = pad_targets([type(target)(target.labels, target.boxes)] * 2)
    with pytest.raises(ValueError, match="needs targets with masks, got None"):
        model(tiny_features(2, *CANVAS), tiny_padding(SIZES, *CANVAS), bare)
