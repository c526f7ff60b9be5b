"""The authors' treatment of padding: what it changes, and that without it padding changes nothing.

tests/equivalence compares it with their code.
"""

from __future__ import annotations

import pytest
import torch
from tiny import config_of

from dn_detr.build import Denoising, build_model
from dn_detr.methods import METHODS
from dn_detr.models.published import set_as_published
from dn_detr.structures import Target, pad_targets

SMALL = {
    "num_classes": 3,
    "num_queries": 100,  # more than the 66 tokens in the image, so that padding proposes
    "channels": 32,
    "num_heads": 4,
    "feed_forward_dim": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_levels": 3,
    "num_patterns": 1,
}
DIFFERS = {
    "anchor_detr",
    "dab_deformable",
    "deformable_detr_two_stage",
    "dino",
    "h_deformable",
    "mask2former",
    "mask_dino",
}
"""Methods whose predictions depend on padding as published; those of the others never do."""


def model_of(method, **auxiliary):
    has_masks = method in ("mask2former", "mask_dino")
    widths, strides = ([8, 8, 16], [4, 8, 16]) if has_masks else ([8, 16], [8, 16])
    torch.manual_seed(0)
    model = build_model(
        method, config_of(method, **SMALL), in_channels=widths, strides=strides, **auxiliary
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    sizes = zip(widths, strides, strict=True)
    features = [torch.randn(1, w, 64 // s, 96 // s, generator=generator) for w, s in sizes]
    padding = torch.zeros(1, 64, 96, dtype=torch.bool)
    padding[:, 48:] = padding[:, :, 64:] = True
    return model.eval(), features, padding


@pytest.mark.parametrize("method", sorted(METHODS))
def test_as_published_changes_predictions_of_padded_images_only(method):
    model, features, padding = model_of(method)
    for is_padded in (False, True):
        with torch.no_grad():
            set_as_published(model, False)
            ours = model(features, padding & is_padded)
            set_as_published(model)
            theirs = model(features, padding & is_padded)
        differ = not torch.allclose(ours.logits, theirs.logits, atol=1e-5)
        two_stage = method in ("deformable_detr_two_stage", "dino", "h_deformable", "mask_dino")
        if is_padded:
            assert differ == (method in DIFFERS)
        elif not two_stage:  # there, tokens at the border propose too
            assert not differ


@pytest.mark.parametrize("method", ["mask2former", "mask_dino"])
def test_padding_is_part_of_the_image_in_published_masks(method):
    """The model sees the canvas; its boxes are given relative to the unpadded image."""
    model, features, padding = model_of(method)
    set_as_published(model)
    with torch.no_grad():
        padded = model(features, padding)
        canvas = model(features, torch.zeros_like(padding))
    torch.testing.assert_close(padded.logits, canvas.logits)
    torch.testing.assert_close(padded.mask_embeddings, canvas.mask_embeddings)
    if method == "mask_dino":
        sides = torch.tensor([96 / 64, 64 / 48] * 2)
        torch.testing.assert_close(padded.boxes, canvas.boxes * sides)


@pytest.mark.parametrize("method", ["dab_detr", "dino", "mask_dino"])
def test_empty_denoising_queries_are_visible_and_negatives_in_dino_alone(method):
    model, features, padding = model_of(method, denoising=Denoising(num_groups=2))
    box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    masks = torch.ones(1, 48, 64, dtype=torch.bool) if "mask" in method else None
    targets = pad_targets(
        [
            Target(torch.tensor([1]), box, noise_seed=0, masks=masks),
            Target(
                torch.tensor([0, 1]),
                box.repeat(2, 1),
                noise_seed=1,
                masks=None if masks is None else masks.repeat(2, 1, 1),
            ),
        ]
    )
    features = [feature.repeat(2, 1, 1, 1) for feature in features]
    padding = padding.repeat(2, 1, 1)
    segment = model.train()(features, padding, targets).segment("dn")
    assert segment.is_empty.sum(1).tolist() == [2, 0]
    set_as_published(model)
    segment = model(features, padding, targets).segment("dn")
    if method == "dab_detr":
        assert segment.is_empty.sum(1).tolist() == [2, 0]
    else:
        assert segment.is_empty is None
        masks = torch.zeros(0, 48, 64, dtype=torch.bool) if "mask" in method else None
        none = Target(torch.zeros(0, dtype=torch.int64), box[:0], noise_seed=0, masks=masks)
        segment = model(features, padding, pad_targets([none, none])).segment("dn")
        assert segment.is_empty.all()


def test_mask2former_with_denoising_has_no_published_form():
    config = config_of("mask2former", **SMALL, as_published=True)
    with pytest.raises(ValueError, match="no published code"):
        build_model(
            "mask2former", config, in_channels=[8, 8, 16], strides=[4, 8, 16], denoising=Denoising()
        )
