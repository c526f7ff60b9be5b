"""From backbone features to feature maps of one width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dn_detr.structures import FeatureMaps, Memory


def resize_padding(padding: Tensor, height: int, width: int) -> Tensor:
    """Padding [B, H, W] bool at the size of a feature map, by nearest neighbour -> [B, h, w]."""
    return F.interpolate(padding[:, None].float(), size=(height, width))[:, 0] > 0.5


class MultiScaleNeck(nn.Module):
    """1x1 projections with group norm, and coarser levels by strided convolutions of the last
    feature (2010.04159, appendix A.2).

    features: B x C_i x h_i x w_i, fine to coarse, with `strides`; padding [B, H, W] bool of the
    image. Gives `num_levels` maps of `channels`.
    """

    def __init__(
        self, *, in_channels: list[int], strides: list[int], channels: int, num_levels: int
    ):
        super().__init__()
        if num_levels < len(in_channels):
            raise ValueError(
                f"num_levels {num_levels} is fewer than the backbone's {len(in_channels)} features"
            )
        self.strides = list(strides)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, channels, kernel_size=1), norm(channels))
            for width in in_channels
        )
        width = in_channels[-1]
        for _ in range(num_levels - len(in_channels)):
            conv = nn.Conv2d(width, channels, kernel_size=3, stride=2, padding=1)
            self.levels.append(nn.Sequential(conv, norm(channels)))
            self.strides.append(self.strides[-1] * 2)
            width = channels
        for level in self.levels:
            nn.init.xavier_uniform_(level[0].weight)  # type: ignore[index]
            nn.init.zeros_(level[0].bias)  # type: ignore[index]

    def forward(self, features: list[Tensor], padding: Tensor) -> FeatureMaps:
        maps = [
            level(feature)
            for level, feature in zip(self.levels[: len(features)], features, strict=True)
        ]
        source = features[-1]
        for level in self.levels[len(features) :]:
            source = level(source)
            maps.append(source)
        paddings = [resize_padding(padding, *feature.shape[-2:]) for feature in maps]
        return FeatureMaps(tuple(maps), tuple(paddings), tuple(self.strides))


class SingleScaleNeck(nn.Module):
    """One map, from the coarsest feature of the backbone by `projection` (2005.12872, sec. 3.2)."""

    def __init__(self, *, projection: nn.Module, stride: int):
        super().__init__()
        self.projection = projection
        self.stride = stride

    def forward(self, features: list[Tensor], padding: Tensor) -> FeatureMaps:
        projected = self.projection(features[-1])
        padding = resize_padding(padding, *projected.shape[-2:])
        return FeatureMaps((projected,), (padding,), (self.stride,))


def norm(channels: int) -> nn.GroupNorm:
    """32 groups where they divide the channels (all published sizes), else groups of 8."""
    return nn.GroupNorm(32 if channels % 32 == 0 else channels // 8, channels)


class Flatten(nn.Module):
    """Feature maps to memory tokens; the position is the cell's sine plus, where there are several
    levels, the embedding of its level."""

    def __init__(self, *, position: nn.Module, channels: int, num_levels: int):
        super().__init__()
        self.position = position
        self.level_embedding = (
            nn.Parameter(torch.randn(num_levels, channels)) if num_levels > 1 else None
        )

    def forward(self, maps: FeatureMaps) -> Memory:
        tokens, positions, paddings, shapes, valid = [], [], [], [], []
        for level, (features, padding) in enumerate(zip(maps.maps, maps.padding, strict=True)):
            position = self.position(padding)
            position = position.to(torch.promote_types(position.dtype, features.dtype))
            if self.level_embedding is not None:
                position = position + self.level_embedding[level]
            tokens.append(features.flatten(2).transpose(1, 2))
            positions.append(position.flatten(1, 2))
            paddings.append(padding.flatten(1))
            shapes.append((features.shape[2], features.shape[3]))
            inside = ~padding
            valid.append(torch.stack((inside[:, 0].sum(1), inside[:, :, 0].sum(1)), dim=-1))
        return Memory(
            tokens=torch.cat(tokens, dim=1),
            position=torch.cat(positions, dim=1),
            padding=torch.cat(paddings, dim=1),
            shapes=tuple(shapes),
            valid_sizes=torch.stack(valid, dim=1).to(positions[0].dtype),
        )
