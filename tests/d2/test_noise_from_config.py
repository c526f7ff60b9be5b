"""DENOISING.BOX_NOISE and LABEL_NOISE of the configuration are those of the noised objects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from dn_detr.d2.config.defaults import read_config
from dn_detr.structures import Target, pad_targets

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OBJECTS = 100
SIZE = 0.1


@pytest.mark.parametrize("box_noise, label_noise", [(0.1, 0.7), (0.8, 0.1)])
@pytest.mark.parametrize("name", ["dn_deformable", "dino", "dn_mask2former", "mask_dino"])
def test_boxes_and_labels_are_noised_as_much_as_the_configuration_says(
    tmp_path, name, box_noise, label_noise
):
    """Objects in the middle of the image, where no noised box reaches the border."""
    file = tmp_path / "config.yaml"
    file.write_text(
        f"_BASE_: {CONFIGS / 'quick' / name}.yaml\n"
        f"MODEL: {{DEVICE: cpu, DN_DETR: {{NUM_CLASSES: 80, DENOISING: {{BOX_NOISE: {box_noise}, "
        f"LABEL_NOISE: {label_noise}, NUM_GROUPS: 5, MAX_OBJECTS: 500}}}}}}\n"
    )
    (denoise,) = build_model(read_config(str(file), [])).core.auxiliary
    labels = torch.arange(OBJECTS) % 80
    boxes = torch.tensor([0.5, 0.5, SIZE, SIZE]).repeat(OBJECTS, 1)
    targets = pad_targets([Target(labels, boxes, noise_seed=seed) for seed in range(4)])
    noised, _ = denoise.noise(targets, num_matched=1, mask_dtype=torch.float32)
    is_positive = noised.assignment >= 0
    assert is_positive.sum() == 4 * 5 * OBJECTS
    moved = noised.boxes[is_positive] - boxes[0]
    centres, sizes = moved.split(2, dim=-1)
    shares = [centres / (SIZE / 2), sizes / SIZE]
    if denoise.config.contrastive:  # sides are moved
        shares = [(centres - sizes / 2) / (SIZE / 2), (centres + sizes / 2) / (SIZE / 2)]
    for share in shares:  # 4000 uniform values between -box_noise and box_noise
        assert 0.99 * box_noise < share.abs().max() < 1.0001 * box_noise
        assert share.abs().mean() == pytest.approx(box_noise / 2, rel=0.05)
    # A new label is the old one in one of 80 cases. 2000 draws: at most 5 standard errors.
    expected = label_noise * 79 / 80
    is_flipped = noised.labels[is_positive] != labels[noised.assignment[is_positive]]
    error = 5 * (expected * (1 - expected) / is_flipped.numel()) ** 0.5
    assert is_flipped.double().mean().item() == pytest.approx(expected, abs=error)
