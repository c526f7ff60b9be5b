"""Denoising queries of objects that touch the border of their image."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import filled_boxes, tiny_features, tiny_model, tiny_padding, tiny_target
from torch.testing import assert_close

from dn_detr.build import Denoising
from dn_detr.structures import pad_targets


@pytest.mark.parametrize("method", ["dab_detr", "dab_deformable", "dino", "mask_dino"])
def test_an_object_as_large_as_the_image_starts_where_the_published_code_starts(method):
    """Boxes go through their logits, whose sides are bounded: 1 becomes 1 / (1 + epsilon)."""
    model = tiny_model(method, denoising=Denoising(num_groups=1, box_noise=0, label_noise=0))
    box = torch.tensor([[0.5, 0.5, 1.0, 1.0]], dtype=torch.float64)
    target = replace(tiny_target(1), boxes=box, masks=filled_boxes(box))
    padding = tiny_padding([(96, 128)] * 2)
    predictions = model(tiny_features(2), padding, pad_targets([target, target]))
    side = 1 / (1 + model.query_design.epsilon)
    expected = torch.tensor([0.5, 0.5, side, side], dtype=torch.float64)
    assert_close(predictions.references[0][0, 0], expected, rtol=0, atol=1e-12)
