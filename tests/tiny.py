"""Small models and batches that the tests share, in float64 where exactness is asked."""

from __future__ import annotations

import torch

from dn_detr.build import Denoising, HybridMatching, build_model
from dn_detr.models.numbers import Numbers
from dn_detr.structures import Target, Targets, pad_targets

ASSISTS = {
    "denoising": {"denoising": Denoising(num_groups=3)},
    "budget": {"denoising": Denoising(num_groups=0, max_objects=9)},
    "contrastive": {"denoising": Denoising(num_groups=3, is_contrastive=True)},
    "groups": {"num_groups": 3},
    "hybrid": {"hybrid": HybridMatching(num_queries=5, repeats=2)},
    "denoising and groups": {"denoising": Denoising(num_groups=2), "num_groups": 3},
    "denoising and hybrid": {
        "denoising": Denoising(num_groups=2),
        "hybrid": HybridMatching(num_queries=5, repeats=2),
    },
}
"""What `tiny_model` is given for each training assist and combination of assists."""

STRIDES = [8, 16, 32]
WIDTHS = [12, 16, 20]


def tiny_model(
    method: str,
    *,
    denoising: Denoising | None = None,
    num_groups: int = 1,
    hybrid: HybridMatching | None = None,
    seed: int = 0,
    **numbers,
):
    """A model of `method` with random weights everywhere, also where training starts from zero."""
    torch.manual_seed(seed)
    sizes = {
        "num_classes": 5,
        "num_queries": 7,
        "channels": 32,
        "num_heads": 4,
        "num_points": 2,
        "feed_forward_dim": 24,
        "encoder_layers": 1,
        "decoder_layers": 3,
    }
    model = build_model(
        method,
        Numbers(**{**sizes, **numbers}),
        in_channels=WIDTHS,
        strides=STRIDES,
        denoising=denoising,
        num_groups=num_groups,
        hybrid=hybrid,
    ).double()
    for parameter in model.parameters():
        # Zero-initialised heads and offsets would hide leaks and dead paths.
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def without_group_norm(model):
    """`model` with the neck's group norms removed, since they average over the padding too."""
    for parent in list(model.neck.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.GroupNorm):
                setattr(parent, name, torch.nn.Identity())
    return model


def tiny_features(batch: int, height: int = 96, width: int = 128, seed: int = 1) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(
            batch, c, height // s, width // s, dtype=torch.float64, generator=generator
        )
        for c, s in zip(WIDTHS, STRIDES, strict=True)
    ]


def tiny_padding(sizes: list[tuple[int, int]], height: int = 96, width: int = 128):
    padding = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for image, (h, w) in enumerate(sizes):
        padding[image, :h, :w] = False
    return padding


def tiny_target(count: int, *, key: int = 0, num_classes: int = 5) -> Target:
    """`count` objects that follow from `key`."""
    generator = torch.Generator().manual_seed(1000 + key)
    centers = torch.rand(count, 2, dtype=torch.float64, generator=generator) * 0.6 + 0.2
    sizes = torch.rand(count, 2, dtype=torch.float64, generator=generator) * 0.3 + 0.05
    labels = torch.randint(num_classes, (count,), generator=generator)
    return Target(labels, torch.cat((centers, sizes), dim=1), noise_key=key)


def tiny_targets(*counts: int) -> Targets:
    """A batch of images with `counts` objects."""
    return pad_targets([tiny_target(count, key=key) for key, count in enumerate(counts)])
