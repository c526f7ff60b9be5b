"""Boxes around masks, and queries of Mask DINO that start from them (2206.02777, sec. 3.3)."""

from __future__ import annotations

import torch
from tiny import tiny_features, tiny_model, tiny_padding

from dn_detr.layers.box_ops import cxcywh_to_xyxy
from dn_detr.models.mask_head import boxes_of_masks, mask_logits

SIZES = [(96, 128), (64, 96)]


def test_the_box_around_a_mask_ends_with_the_image():
    masks = torch.full((1, 3, 4, 8), -1.0)
    masks[0, 0, 1:3, 2:4] = 1.0
    masks[0, 1, 2, 5:] = 1.0  # goes on into the padding
    masks[0, 2, 3, 7] = 1.0  # padding alone
    boxes, is_empty = boxes_of_masks(masks, torch.tensor([[6.0, 3.0]]))
    expected = [[2 / 6, 1 / 3, 4 / 6, 1.0], [5 / 6, 2 / 3, 1.0, 1.0]]
    torch.testing.assert_close(cxcywh_to_xyxy(boxes[0, :2]), torch.tensor(expected))
    assert is_empty.tolist() == [[False, False, True]]
    smaller, _ = boxes_of_masks(masks, torch.tensor([[6.0, 3.0]]), last=0)
    torch.testing.assert_close(boxes[0, 0, 2:] - smaller[0, 0, 2:], torch.tensor([1 / 6, 1 / 3]))
    assert boxes[0, 2].tolist() == [0.5] * 4


def test_a_query_of_mask_dino_starts_from_the_box_around_its_first_mask():
    model = tiny_model("mask_dino")
    predictions = model(tiny_features(2), tiny_padding(SIZES))
    proposals, mask_features = predictions.proposals, predictions.mask_features
    masks = mask_logits(proposals.mask_embeddings[0], mask_features.features)
    num_with_masks = 0
    for image, (width, height) in enumerate(mask_features.valid_sizes.tolist()):
        for query, mask in enumerate(masks[image, :, : int(height), : int(width)] > 0):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            reference = predictions.references[0][image, query]
            if len(rows) == 0:
                assert torch.equal(reference, proposals.boxes[0, image, query])
                continue
            num_with_masks += 1
            sides = torch.stack((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)).flatten()
            box = sides.to(reference.dtype) / torch.tensor([width, height] * 2)
            torch.testing.assert_close(cxcywh_to_xyxy(reference), box, atol=2e-3, rtol=0)
    assert num_with_masks > 3
