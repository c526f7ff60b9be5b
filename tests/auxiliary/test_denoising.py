"""What denoising queries are made of, and what their losses are divided by."""

from __future__ import annotations

import pytest
import torch
from tiny import (
    METHODS_WITHOUT_BOXES,
    tiny_features,
    tiny_losses,
    tiny_model,
    tiny_padding,
    tiny_targets,
)

from dn_detr.build import Denoising
from dn_detr.methods import METHODS
from dn_detr.structures import Target, pad_targets

SIZES = [(96, 128), (64, 96)]
NAMES = [name for name in METHODS if name not in METHODS_WITHOUT_BOXES]


@pytest.mark.parametrize("is_contrastive", [False, True])
@pytest.mark.parametrize("method", ["dab_detr", "dab_deformable"])
def test_the_loss_is_a_mean_over_groups(method, is_contrastive):
    """Without noise all groups are equal, so that their number changes nothing."""
    targets = tiny_targets(2, 3)
    losses = []
    for num_groups in (1, 3):
        denoising = Denoising(
            num_groups=num_groups, box_noise=0.0, label_noise=0.0, contrastive=is_contrastive
        )
        model = tiny_model(method, denoising=denoising)
        predictions = model(tiny_features(2), tiny_padding(SIZES), targets)
        losses.append(tiny_losses(method, predictions, targets, 5.0))
    assert losses[0]["loss_ce_dn"] > 0
    for key, value in losses[0].items():
        torch.testing.assert_close(losses[1][key], value, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("method", NAMES)
def test_references_have_finite_logits_where_boxes_end_at_the_border(method):
    """Their centres are at 0 and 1, and so, nearly, are their sizes."""
    boxes = torch.tensor([[0.0, 1.0, 1e-9, 1.0], [1.0, 0.0, 1.0, 1e-9]], dtype=torch.float64)
    targets = pad_targets([Target(torch.tensor([0, 1]), boxes, noise_seed=key) for key in (0, 1)])
    denoising = Denoising(num_groups=1, box_noise=0.0, label_noise=0.0)
    model = tiny_model(method, denoising=denoising)
    predictions = model(tiny_features(2), tiny_padding(SIZES), targets).of("dn")
    reference = predictions.references[0]
    if reference is not None:
        assert reference.min() == pytest.approx(1e-3 / 1.001)
        assert reference.max() == pytest.approx(1 / 1.001)
    assert predictions.boxes.isfinite().all()
