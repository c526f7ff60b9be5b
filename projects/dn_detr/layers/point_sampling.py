"""Random points and bilinear sampling of masks at points.

Points [..., 2] are (x, y) in [0, 1] of the unpadded image. Sampling is bilinear between cell
centres; within half a cell of the border it returns the value of the outermost cells.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dn_detr.layers.box_ops import at_least_float32
from dn_detr.ops.philox import POINT_DRAW, philox
from dn_detr.structures import MaskFeatures


def random_points(noise_seeds: Tensor, count: int, stream: int) -> Tensor:
    """Draw uniform points [B, count, 2] float32 from noise_seeds [B] int64 alone.

    stream: index of the random stream, one per purpose.
    """
    pairs = torch.arange((count + 1) // 2, device=noise_seeds.device)
    words = philox(noise_seeds[:, None], (pairs, stream, POINT_DRAW, 0))
    uniform = (torch.stack(words, dim=-1) >> 8).float() * 2.0**-24
    return uniform.reshape(noise_seeds.shape[0], -1, 2)[:, :count]


def sample_features(mask_features: MaskFeatures, points: Tensor) -> Tensor:
    """Sample mask features [B, C, h, w] at points [B, P, 2]: [B, C, P], at least float32.

    Under `torch.use_deterministic_algorithms` it gathers instead of calling `grid_sample`, whose
    backward is not deterministic on CUDA: the same values, slower.
    """
    features = at_least_float32(mask_features.features)
    height, width = features.shape[-2:]
    valid = mask_features.valid_sizes.to(features.dtype)[:, None]
    cells = torch.minimum(points.to(features.dtype) * valid, valid - 0.5).clamp(min=0.5)
    x, y = cells.unbind(-1)
    if torch.are_deterministic_algorithms_enabled():
        flat = features.flatten(2)

        def gather(y: Tensor, x: Tensor) -> Tensor:
            return flat.gather(2, (y * width + x).expand(-1, flat.shape[1], -1))

        return _bilinear(gather, x[:, None], y[:, None], width, height)
    grid = torch.stack((x * (2 / width) - 1, y * (2 / height) - 1), dim=-1)
    return F.grid_sample(features, grid[:, :, None], align_corners=False)[..., 0]


def sample_masks(masks: Tensor, points: Tensor) -> Tensor:
    """Sample masks [n, H, W] bool of an image at points [P, 2]: [n, P] float32 in [0, 1]."""
    height, width = masks.shape[-2:]
    flat = masks.flatten(1)

    def gather(y: Tensor, x: Tensor) -> Tensor:
        return flat.index_select(1, y * width + x).float()

    x, y = points.float().unbind(-1)
    return _bilinear(gather, x * width, y * height, width, height)


def _bilinear(
    gather: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, width: int, height: int
) -> Tensor:
    """Interpolate at (x, y) [..., P] in cells; `gather` takes rows and columns [..., P] int64."""
    x0, x1, right = _neighbours(x, width)
    y0, y1, below = _neighbours(y, height)
    upper = torch.lerp(gather(y0, x0), gather(y0, x1), right)
    return torch.lerp(upper, torch.lerp(gather(y1, x0), gather(y1, x1), right), below)


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both neighbouring cells along an axis and the weight of the second, shaped like position."""
    position = (position - 0.5).clamp(min=0).clamp(max=size - 1)
    first = position.floor()
    index = first.long()
    return index, (index + 1).clamp(max=size - 1), position - first


def moved_masks(masks: Tensor, object_of: Tensor, shift: Tensor, points: Tensor) -> Tensor:
    """Return whether points lie inside shifted masks: [T, P] bool, False outside the image.

    Args:
        masks: [n, H, W] bool, of one image.
        object_of: [T] int64 in [0, n), the mask of each query.
        shift: [T, 2] (x, y) as fractions of the image size.
        points: [P, 2].
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
