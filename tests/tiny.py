"""Small models and batches that the tests share, in float64 where exactness is asked."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import torch

from dn_detr.build import (
    BoxPrompting,
    Denoising,
    HybridMatching,
    LossConfig,
    build_model,
)
from dn_detr.layers.box_ops import cxcywh_to_xyxy
from dn_detr.losses.mask_costs import MaskCosts
from dn_detr.losses.matcher import Costs, assign
from dn_detr.methods import config_class
from dn_detr.models.model_config import ModelConfig
from dn_detr.structures import Predictions, Target, Targets, pad_targets

AUXILIARY = {
    "denoising": {"denoising": Denoising(num_groups=3)},
    "budget": {"denoising": Denoising(num_groups=0, max_objects=9)},
    "contrastive": {"denoising": Denoising(num_groups=3, contrastive=True)},
    "groups": {"num_groups": 3},
    "hybrid": {"hybrid": HybridMatching(num_queries=5, matches_per_object=2)},
    "denoising and groups": {"denoising": Denoising(num_groups=2), "num_groups": 3},
    "denoising and hybrid": {
        "denoising": Denoising(num_groups=2),
        "hybrid": HybridMatching(num_queries=5, matches_per_object=2),
    },
}
"""What `tiny_model` is given for each training auxiliary and combination of auxiliary."""

STRIDES = [8, 16, 32]
WIDTHS = [12, 16, 20]

METHODS_WITH_MASKS = ("mask2former", "mask_dino")
METHODS_WITHOUT_BOXES = ("mask2former",)


def levels_of_features(method: str) -> int:
    """Levels that need no strided convolution, which would read across the border of an image."""
    return 2 if method in METHODS_WITH_MASKS else 3  # there, the finest feature is for masks alone


def tiny_model(
    method: str,
    *,
    denoising: Denoising | None = None,
    num_groups: int = 1,
    hybrid: HybridMatching | None = None,
    prompts: BoxPrompting | None = None,
    seed: int = 0,
    **numbers,
):
    """A model of `method` with random weights everywhere, also where training starts from zero."""
    if method == "mask2former" and denoising is not None and denoising.contrastive:
        pytest.skip("masks are shifted, which has no contrastive form")
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
        config_of(method, **{**sizes, **numbers}),
        in_channels=WIDTHS,
        strides=STRIDES,
        denoising=denoising,
        num_groups=num_groups,
        hybrid=hybrid,
        prompts=prompts,
    ).double()
    for parameter in model.parameters():
        # Zero-initialised heads and offsets would hide leaks and dead paths.
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def config_of(method: str, **values) -> ModelConfig:
    """The hyper-parameters of a method, those of `values` that it reads."""
    kind = config_class(method)
    names = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


def without_group_norm(model):
    """`model` with its group norms removed, since they average over the padding too."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.GroupNorm):
                setattr(parent, name, torch.nn.Identity())
    return model


def tiny_features(batch: int, height: int = 96, width: int = 128, seed: int = 1) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, c, height // s, width // s, dtype=torch.float64, generator=generator)
        for c, s in zip(WIDTHS, STRIDES, strict=True)
    ]


def tiny_padding(sizes: list[tuple[int, int]], height: int = 96, width: int = 128):
    padding = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for image, (h, w) in enumerate(sizes):
        padding[image, :h, :w] = False
    return padding


def tiny_target(count: int, *, key: int = 0, num_classes: int = 5) -> Target:
    """`count` objects that follow from `key`; their masks fill their boxes."""
    generator = torch.Generator().manual_seed(1000 + key)
    centers = torch.rand(count, 2, dtype=torch.float64, generator=generator) * 0.6 + 0.2
    sizes = torch.rand(count, 2, dtype=torch.float64, generator=generator) * 0.3 + 0.05
    labels = torch.randint(num_classes, (count,), generator=generator)
    boxes = torch.cat((centers, sizes), dim=1)
    return Target(labels, boxes, masks=filled_boxes(boxes), noise_seed=key)


def filled_boxes(boxes: torch.Tensor, height: int = 48, width: int = 64) -> torch.Tensor:
    """Masks [n, height, width] of rectangles."""
    x0, y0, x1, y1 = cxcywh_to_xyxy(boxes)[:, :, None, None].unbind(1)
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height)[:, None] + 0.5) / height
    return (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)


def tiny_targets(*counts: int) -> Targets:
    """A batch of images with `counts` objects."""
    return pad_targets([tiny_target(count, key=key) for key, count in enumerate(counts)])


def tiny_losses(method: str, predictions: Predictions, targets: Targets, num_objects=None) -> dict:
    """All losses that a method has, with few points for masks."""
    costs, weights, masks = Costs(), {}, None
    if method in METHODS_WITHOUT_BOXES:
        weights = {"l1_weight": 0, "giou_weight": 0}
        costs = Costs(l1=0, giou=0)
    if method in METHODS_WITH_MASKS:
        costs = MaskCosts(others=costs, num_points=40)
        masks = LossConfig(mask_points=32).mask_terms()
    assignments = assign(predictions, targets, costs)
    if num_objects is None:
        num_objects = max(1, sum(targets.counts))
    criterion = LossConfig(**weights).criterion(masks)
    return criterion(predictions, targets, assignments, num_objects)


def outputs_of(predictions: Predictions) -> dict[str, torch.Tensor]:
    """The tensors of predictions that there are: name -> [L, B, Q, ...]."""
    values = {name: getattr(predictions, name) for name in ("logits", "boxes", "mask_embeddings")}
    return {name: value for name, value in values.items() if value is not None}


def key_of(key: str, segment: str) -> str:
    """The name of the same loss in another segment: loss_ce_0 -> loss_ce_<segment>_0."""
    return re.sub(r"^(.*?)((?:_\d+)?)$", rf"\1_{segment}\2", key)


def read_by(config_file, settings: list[str], opts=()) -> list[str]:
    """Those of `settings` that the model of a configuration with `opts` reads."""
    from detectron2.config import get_cfg

    from dn_detr.d2.config.defaults import add_dn_detr_config
    from dn_detr.d2.config.unread_keys import why_unread

    cfg = get_cfg()
    add_dn_detr_config(cfg)
    try:
        cfg.merge_from_file(str(config_file), allow_unsafe=False)
    except Exception:  # the program under test says what is wrong with the file
        return settings
    keys = [str(part) for part in opts][::2]
    for key in ("MODEL.DN_DETR.METHOD", "MODEL.META_ARCHITECTURE", "MODEL.MASK_ON"):
        if key in keys:
            cfg.merge_from_list([key, opts[2 * keys.index(key) + 1]])
    pairs = zip(settings[::2], settings[1::2], strict=True)
    return [part for pair in pairs if not why_unread(cfg, pair[0]) for part in pair]
