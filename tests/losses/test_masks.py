"""Costs and losses of masks, against whole masks and plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_values import random_predictions, random_targets
from torch.nn import functional as F

from dn_detr.build import LossConfig
from dn_detr.layers.point_sampling import random_points
from dn_detr.losses.mask_costs import MaskCosts
from dn_detr.losses.mask_points import CANDIDATES, MATCHING, RANDOM, PointSampling
from dn_detr.losses.matcher import Costs, assign
from dn_detr.losses.matching_costs import list_objects
from dn_detr.structures import MaskFeatures, Predictions, Segment

CLASS_ONLY = Costs(l1=0, giou=0)


def with_masks(targets, seed=3):
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(n, 20, 30, generator=generator) < 0.5 for n in targets.counts]
    keys = torch.arange(len(masks)) + 7
    return replace(targets, masks=tuple(masks), noise_seeds=keys)


def masked_predictions(*segments, batch=2, layers=2) -> Predictions:
    generator = torch.Generator().manual_seed(5)
    plain = random_predictions(*segments, batch=batch, layers=layers)
    slots = plain.logits.shape[2]
    return replace(
        plain,
        mask_embeddings=torch.randn(
            layers, batch, slots, 6, generator=generator, dtype=torch.float64
        ),
        mask_features=MaskFeatures(
            torch.randn(batch, 6, 8, 12, generator=generator, dtype=torch.float64),
            torch.tensor([[12.0, 8.0], [9.0, 8.0]], dtype=torch.float64)[:batch],
        ),
    )


def at(grid, points):
    """Values of whole masks [n, h, w] at points [P, 2] -> [n, P]."""
    grid = grid.double()[None]
    return F.grid_sample(
        grid, points.double()[None, None] * 2 - 1, align_corners=False, padding_mode="border"
    )[0, :, 0]


def whole_mask(predictions, layer, image, slot):
    """[1, h, w] of the unpadded image."""
    width, height = predictions.mask_features.valid_sizes[image].int().tolist()
    features = predictions.mask_features.features[image, :, :height, :width]
    embedding = predictions.mask_embeddings[layer, image, slot]
    return torch.einsum("c,chw->hw", embedding, features)[None]


def losses_of_one(logits, labels):
    """Cross-entropy and Dice of values [P]."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, labels)
    p = logits.sigmoid()
    return cross_entropy, 1 - (2 * (p * labels).sum() + 1) / (p.sum() + labels.sum() + 1)


def test_costs_are_those_of_whole_masks_at_the_points():
    predictions = masked_predictions(Segment("match", 5))
    targets = with_masks(random_targets(2, 3))
    costs = MaskCosts(others=CLASS_ONLY, cross_entropy=3.0, dice=7.0, num_points=50)
    objects = list_objects(targets)
    found = costs(predictions, objects) - CLASS_ONLY(predictions, objects)
    points = random_points(targets.noise_seeds, 50, MATCHING)
    for t, image in enumerate([0, 0, 1, 1, 1]):
        place = t if image == 0 else t - 2
        labels = at(targets.masks[image][place][None], points[image])[0]
        for layer in range(2):
            for slot in range(5):
                logits = at(whole_mask(predictions, layer, image, slot), points[image])[0]
                cross_entropy, dice = losses_of_one(logits, labels)
                expected = 3 * cross_entropy + 7 * dice
                torch.testing.assert_close(found[layer, t, slot], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("counts", [(2, 3), (0, 3)])
def test_losses_are_those_of_whole_masks_at_the_most_unsure_candidates(counts):
    """One slot at a time, for a fixed segment of two groups beside the matched one."""
    fixed = torch.tensor([[0, 1, -1, 1, 0, -1], [2, 0, 1, -1, 1, 2]])
    if counts[0] == 0:
        fixed[0] = -1
    denoise = Segment(
        "dn", 6, num_groups=2, attends_to=("match",), assignment=fixed, positives_per_object=2
    )
    predictions = masked_predictions(denoise, Segment("match", 4))
    targets = with_masks(random_targets(*counts))
    sampling = PointSampling(num_points=12, oversample=2.5, importance=0.75)
    criterion = LossConfig().criterion(
        replace(LossConfig(mask_weight=2.0, dice_weight=3.0).mask_terms(), points=sampling)
    )
    assignments = assign(predictions, targets, MaskCosts(others=Costs(), num_points=9))
    losses = criterion(predictions, targets, assignments, 4.0)
    candidates = random_points(targets.noise_seeds, 30, CANDIDATES)
    others = random_points(targets.noise_seeds, 3, RANDOM)
    for name, copies in (("dn", 2), ("match", 1)):
        part, label = predictions.of(name), "_dn" if name == "dn" else ""
        for layer, suffix in ((0, "_0"), (1, "")):
            total = torch.zeros(2, dtype=torch.float64)
            for image, slot in (assignments[name].object_of[layer] >= 0).nonzero().tolist():
                mask = targets.masks[image][assignments[name].object_of[layer, image, slot]][None]
                whole = whole_mask(part, layer, image, slot)
                order = at(whole, candidates[image])[0].abs().argsort()
                points = torch.cat((candidates[image][order[:9]], others[image]))
                total += torch.stack(losses_of_one(at(whole, points)[0], at(mask, points)[0]))
            found = [losses[f"loss_{term}{label}{suffix}"] for term in ("mask", "dice")]
            expected = total * torch.tensor([2.0, 3.0]) / (4 * copies)
            torch.testing.assert_close(torch.stack(found), expected, atol=1e-5, rtol=1e-5)


def test_a_segment_can_do_without_masks():
    fixed = torch.tensor([[0, 1], [1, 0]])
    predictions = masked_predictions(Segment("dn", 2, assignment=fixed), Segment("match", 4))
    targets = with_masks(random_targets(2, 2))
    masks = LossConfig(mask_points=8).mask_terms(without=("dn",))
    assignments = assign(predictions, targets, CLASS_ONLY)
    names = LossConfig().criterion(masks)(predictions, targets, assignments, 4.0)
    assert {"loss_mask", "loss_dice_0", "loss_bbox_dn"} <= set(names)
    assert not {"loss_mask_dn", "loss_dice_dn_0"} & set(names)


def test_what_is_around_an_image_in_its_batch_changes_nothing():
    predictions, targets = masked_predictions(Segment("match", 4)), with_masks(random_targets(3, 2))
    sampling = PointSampling(num_points=20)
    together = sampling.sample(predictions, targets)
    pixels = predictions.mask_features
    alone = sampling.sample(
        replace(
            predictions,
            logits=predictions.logits[:, 1:],
            boxes=predictions.boxes[:, 1:],
            mask_embeddings=predictions.mask_embeddings[:, 1:],
            mask_features=MaskFeatures(pixels.features[1:, :, :, :9], pixels.valid_sizes[1:]),
        ),
        replace(
            targets,
            **{name: getattr(targets, name)[1:, :2] for name in ("labels", "boxes", "is_object")},
            noise_seeds=targets.noise_seeds[1:],
            counts=targets.counts[1:],
            masks=targets.masks[1:],
        ),
    )
    torch.testing.assert_close(alone.features[0], together.features[1])
    assert torch.equal(alone.labels[0], together.labels[1, :2])


def test_predictions_or_targets_without_masks_are_refused():
    predictions, targets = masked_predictions(Segment("match", 4)), random_targets(3, 2)
    with pytest.raises(ValueError, match="need predictions and targets with masks"):
        PointSampling().sample(predictions, targets)
    with pytest.raises(ValueError, match="need predictions and targets with masks"):
        assign(predictions, targets, MaskCosts(others=CLASS_ONLY))
    with pytest.raises(ValueError, match=r"importance in \[0, 1\], got 12544, 3.0 and 2"):
        PointSampling(importance=2)
