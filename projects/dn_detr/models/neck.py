"""Necks that project backbone features to C channels, and flattening to memory tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dn_detr.structures import FeatureMaps, Memory


def resize_padding(padding: Tensor, height: int, width: int) -> Tensor:
    """Resize padding [B, H, W] bool to [B, height, width] by nearest neighbour."""
    return F.interpolate(padding[:, None].float(), size=(height, width))[:, 0] > 0.5


class MultiScaleNeck(nn.Module):
    """1x1 projections, and strided convolutions for extra coarse levels (2010.04159, app. A.2)."""

    def __init__(
        self, *, in_channels: list[int], strides: list[int], channels: int, num_levels: int
    ):
        super().__init__()
        if num_levels < len(in_channels):
            raise ValueError(
                f"num_levels must be at least the number of backbone features {len(in_channels)}, "
                f"got {num_levels}"
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
        """Project features [B, C_i, h_i, w_i], fine to coarse; padding [B, H, W] bool."""
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
    """Projection of the coarsest backbone feature (2005.12872, sec. 3.2)."""

    def __init__(self, *, projection: nn.Module, stride: int):
        super().__init__()
        self.projection = projection
        self.stride = stride

    def forward(self, features: list[Tensor], padding: Tensor) -> FeatureMaps:
        """Project the last of features [B, C_i, h_i, w_i]; padding [B, H, W] bool."""
        projected = self.projection(features[-1])
        padding = resize_padding(padding, *projected.shape[-2:])
        return FeatureMaps((projected,), (padding,), (self.stride,))


def norm(channels: int) -> nn.GroupNorm:
    """Build a group norm of 32 groups if they divide the channels, else of groups of 8 channels."""
    return nn.GroupNorm(32 if channels % 32 == 0 else channels // 8, channels)


class Flatten(nn.Module):
    """Flatten feature maps to memory tokens.

    position: padding [B, h, w] of all levels -> position encoding [B, S, C]. With several levels, a
    learned level embedding is added to it.
    """

    def __init__(self, *, position: nn.Module, channels: int, num_levels: int):
        super().__init__()
        self.position = position
        self.level_embedding = (
            nn.Parameter(torch.randn(num_levels, channels)) if num_levels > 1 else None
        )

    def forward(self, maps: FeatureMaps) -> Memory:
        """Return the memory of S tokens, level by level, row by row."""
        shapes = tuple((features.shape[2], features.shape[3]) for features in maps.maps)
        position = self.position(*maps.padding)
        position = position.to(torch.promote_types(position.dtype, maps.maps[0].dtype))
        if self.level_embedding is not None:
            of_levels = [
                level.expand(height * width, -1)
                for level, (height, width) in zip(self.level_embedding, shapes, strict=True)
            ]
            position = position + torch.cat(of_levels)
        insides = [~padding for padding in maps.padding]
        valid = [n for inside in insides for n in (inside[:, 0].sum(1), inside[:, :, 0].sum(1))]
        return Memory(
            tokens=torch.cat([x.flatten(2).transpose(1, 2) for x in maps.maps], dim=1),
            position=position,
            padding=torch.cat([padding.flatten(1) for padding in maps.padding], dim=1),
            shapes=shapes,
            valid_sizes=torch.stack(valid, dim=1).unflatten(1, (-1, 2)).to(position.dtype),
        )
