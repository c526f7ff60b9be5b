"""Random points of an image, and what masks say there.

Points [..., 2] are (x, y) in [0, 1] of the unpadded image. Values between the centres of cells are
bilinear; within half a cell of the border they are those of the outermost cells.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dn_detr.layers.box_ops import at_least_float32
from dn_detr.ops.philox import philox
from dn_detr.structures import MaskFeatures

POINT_DRAW = 2
"""Third word of the counter; `ops.noise_objects` uses 0 and 1 with the same keys."""


def random_points(noise_seeds: Tensor, count: int, stream: int) -> Tensor:
    """Uniform points [B, count, 2], float32, that follow from the images' keys [B] int64 alone.

    stream: tells apart the points that an image needs for different purposes.
    """
    pairs = torch.arange((count + 1) // 2, device=noise_seeds.device)
    words = philox(noise_seeds[:, None], (pairs, stream, POINT_DRAW, 0))
    uniform = (torch.stack(words, dim=-1) >> 8).float() * 2.0**-24
    return uniform.reshape(noise_seeds.shape[0], -1, 2)[:, :count]


def sample_features(mask_features: MaskFeatures, points: Tensor) -> Tensor:
    """Features of a map at points [B, P, 2] -> [B, C, P], at least float32.

    With `torch.use_deterministic_algorithms` by gathering, since the gradients of `grid_sample` have
    no deterministic order on a GPU: the same values, slower.
    """
    features = at_least_float32(mask_features.features)
    height, width = features.shape[-2:]
    valid = mask_features.valid_sizes.to(features.dtype)[:, None]
    cells = torch.minimum(points.to(features.dtype) * valid, valid - 0.5).clamp(min=0.5)
    x, y = cells.unbind(-1)
    if torch.are_deterministic_algorithms_enabled():
        flat = features.flatten(2)

        def at(y: Tensor, x: Tensor) -> Tensor:
            return flat.gather(2, (y * width + x).expand(-1, flat.shape[1], -1))

        return _bilinear(at, x[:, None], y[:, None], width, height)
    grid = torch.stack((x * (2 / width) - 1, y * (2 / height) - 1), dim=-1)
    return F.grid_sample(features, grid[:, :, None], align_corners=False)[..., 0]


def sample_masks(masks: Tensor, points: Tensor) -> Tensor:
    """Masks [n, H, W] bool of an image at points [P, 2] -> [n, P] in [0, 1], float32."""
    height, width = masks.shape[-2:]
    flat = masks.flatten(1)

    def at(y: Tensor, x: Tensor) -> Tensor:
        return flat.index_select(1, y * width + x).float()

    x, y = points.float().unbind(-1)
    return _bilinear(at, x * width, y * height, width, height)


def _bilinear(
    at: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, width: int, height: int
) -> Tensor:
    """The value at (x, y) [..., P], in cells, between its four neighbours; `at` takes their rows and
    columns [..., P] int64."""
    x0, x1, right = _neighbours(x, width)
    y0, y1, below = _neighbours(y, height)
    upper = torch.lerp(at(y0, x0), at(y0, x1), right)
    return torch.lerp(upper, torch.lerp(at(y1, x0), at(y1, x1), right), below)


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two cells around a position along an axis, and the share of the second."""
    position = (position - 0.5).clamp(min=0).clamp(max=size - 1)
    first = position.floor()
    index = first.long()
    return index, (index + 1).clamp(max=size - 1), position - first


def moved_masks(masks: Tensor, object_of: Tensor, shift: Tensor, points: Tensor) -> Tensor:
    """Whether points [P, 2] lie in masks that were moved: [T, P] bool.

    masks [n, H, W] bool of an image; object_of [T] int64 in [0, n); shift [T, 2] in shares of the
    image. Outside of the image there is nothing.
    """
    height, width = masks.shape[-2:]
    if masks.shape[0] == 0:
        return torch.zeros(
            object_of.shape[0], points.shape[0], dtype=torch.bool, device=masks.device
        )
    x, y = (points - shift[:, None]).unbind(-1)  # [T, P]
    is_inside = (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    column = (x * width).long().clamp(0, width - 1)
    row = (y * height).long().clamp(0, height - 1)
    index = (object_of[:, None] * height + row) * width + column
    return masks.reshape(-1)[index] & is_inside
