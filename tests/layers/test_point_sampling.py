"""Points in images: random ones, and values of maps and masks there."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dn_detr.layers.point_sampling import moved_masks, random_points, sample_features, sample_masks
from dn_detr.structures import MaskFeatures

KEYS = torch.tensor([3, 1 << 40, 3])


def test_points_follow_from_the_key_alone_and_fill_the_image():
    points = random_points(KEYS, 4001, stream=1)
    assert points.shape == (3, 4001, 2)
    assert torch.equal(points[0], points[2]) and not torch.equal(points[0], points[1])
    assert torch.equal(random_points(KEYS[1:2], 4001, stream=1)[0], points[1])
    assert torch.equal(random_points(KEYS, 100, stream=1), points[:, :100])
    assert not torch.equal(random_points(KEYS, 4001, stream=2), points)
    assert points.min() >= 0 and points.max() < 1
    quarters = (points[0] >= 0.5).long() @ torch.tensor([1, 2])
    assert (quarters.bincount(minlength=4) / 4001 - 0.25).abs().max() < 0.03
    assert abs(points[0].T.corrcoef()[0, 1]) < 0.06


def bilinear(grid, x, y):
    """Value of grid [h, w] at (x, y) in cells whose centres are at .5, one point at a time."""
    height, width = grid.shape
    x, y = min(max(x - 0.5, 0), width - 1), min(max(y - 0.5, 0), height - 1)
    x0, y0 = int(x), int(y)
    x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
    upper = grid[y0, x0] * (1 - (x - x0)) + grid[y0, x1] * (x - x0)
    lower = grid[y1, x0] * (1 - (x - x0)) + grid[y1, x1] * (x - x0)
    return upper * (1 - (y - y0)) + lower * (y - y0)


def test_features_are_bilinear_within_the_unpadded_image():
    features = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    features[1, :, 4:], features[1, :, :, 5:] = torch.nan, torch.nan
    valid = torch.tensor([[8.0, 6.0], [5.0, 4.0]], dtype=torch.float64)
    points = torch.rand(2, 50, 2, dtype=torch.float64)
    points[:, :3] = torch.tensor([[0, 0], [1, 1], [0.999, 0.001]])
    features = torch.where(features.isnan(), 1e9, features)  # grid_sample multiplies by 0
    sampled = sample_features(MaskFeatures(features, valid), points)
    for image, (width, height) in enumerate(valid.int().tolist()):
        for i, (x, y) in enumerate(points[image].tolist()):
            for channel in range(3):
                grid = features[image, channel, :height, :width]
                expected = bilinear(grid, x * width, y * height)
                torch.testing.assert_close(sampled[image, channel, i], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("valid", [[8.0, 6.0], [5.25, 3.5], [1.0, 1.0], [0.25, 0.5]])
def test_features_are_the_same_by_gathering_which_is_deterministic_on_a_gpu(valid):
    """Values and gradients; also of an image that is smaller than half a cell."""
    features = torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([valid, [8.0, 6.0]], dtype=torch.float64)
    points = torch.rand(2, 50, 2, dtype=torch.float64)
    points[:, :3] = torch.tensor([[0, 0], [1, 1], [0.999, 0.001]])
    weight = torch.randn(2, 3, 50, dtype=torch.float64)
    found = []
    for is_deterministic in (False, True):
        torch.use_deterministic_algorithms(is_deterministic)
        try:
            sampled = sample_features(MaskFeatures(features, sizes), points)
            (gradient,) = torch.autograd.grad((sampled * weight).sum(), features)
        finally:
            torch.use_deterministic_algorithms(False)
        found.append((sampled, gradient))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_masks_are_bilinear_like_features():
    masks = torch.rand(4, 7, 9) < 0.5
    points = torch.rand(60, 2)
    whole = MaskFeatures(masks[None].double(), torch.tensor([[9.0, 7.0]]))
    expected = sample_features(whole, points[None].double())[0]
    torch.testing.assert_close(sample_masks(masks, points).double(), expected, atol=1e-5, rtol=0)
    assert sample_masks(masks[:0], points).shape == (0, 60)


@pytest.mark.parametrize("shift", [(0, 0), (3, 0), (-2, 1), (0, -8), (20, 0)])
def test_a_moved_mask_is_the_mask_moved(shift):
    """By whole pixels: the same as padding and cropping."""
    masks = torch.rand(2, 8, 10) < 0.4
    dx, dy = shift
    moved = torch.zeros_like(masks) if dx >= 10 or -dy >= 8 else F.pad(masks, (dx, -dx, dy, -dy))
    y, x = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(10) + 0.5, indexing="ij")
    points = torch.stack((x / 10, y / 8), dim=-1).flatten(0, 1)
    object_of = torch.tensor([1, 0, 1])
    shifts = torch.tensor([[dx / 10, dy / 8]]).expand(3, 2)
    found = moved_masks(masks, object_of, shifts, points)
    assert torch.equal(found, moved[object_of].flatten(1))
    assert not moved_masks(masks[:0], torch.zeros(3, dtype=torch.int64), shifts, points).any()
