"""Sizes and inputs for benchmarks of deformable attention, and lower bounds of their cost."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

HEADS, CHANNELS, POINTS = 8, 32, 4
STRIDES = (8, 16, 32, 64)


@dataclass(frozen=True)
class Case:
    """queries 0: one for each cell, as in the encoder."""

    queries: int
    batch: int
    dtype: str
    locations: str
    image: tuple[int, int] = (800, 1066)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return tuple(tuple(math.ceil(side / stride) for side in self.image) for stride in STRIDES)

    def row(self) -> dict:
        where = f"decoder {self.queries}" if self.queries else "encoder"
        return {"case": where, **asdict(self), "image": "x".join(map(str, self.image))}


@dataclass(frozen=True)
class Inputs:
    """Inputs of the whole module, and (locations, weights) of the sampling; all need gradients."""

    value: Tensor
    shapes: tuple[tuple[int, int], ...]
    valid_sizes: Tensor
    reference: Tensor
    offsets: Tensor
    logits: Tensor
    padding: Tensor
    locations: Tensor
    weights: Tensor
    grad: Tensor


def make_inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    rand, randn = (functools.partial(f, generator=generator) for f in (torch.rand, torch.randn))
    levels, tokens = len(case.shapes), sum(h * w for h, w in case.shapes)
    queries = case.queries or tokens
    valid_sizes, padding = _pad(case)
    reference = _boxes(rand, queries) if case.queries else _grid(case.shapes, valid_sizes)
    angle = torch.arange(HEADS) * (2 * torch.pi / HEADS)
    direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
    direction = direction / direction.abs().amax(dim=-1, keepdim=True)
    start = direction[:, None, None] * torch.arange(1, POINTS + 1)[:, None]  # [H, 1, P, 2]
    offsets = start + 2 * randn(case.batch, queries, HEADS, levels, POINTS, 2)
    logits = randn(case.batch, queries, HEADS, levels * POINTS)
    dtype = getattr(torch, case.dtype)
    offsets, logits = offsets.to(dtype), logits.to(dtype)  # what the linear layers give
    reference = reference.expand(case.batch, -1, -1)
    locations = locate(case.shapes, valid_sizes, reference, offsets)
    weights = normalize(logits, levels)
    if case.locations == "uniform":
        locations = rand(locations.shape)
    value = randn(case.batch, tokens, HEADS, CHANNELS).to(dtype)
    grad = randn(case.batch, queries, HEADS * CHANNELS).to(dtype)

    def leaf(x):
        return x.detach().to(device).contiguous().requires_grad_()

    return Inputs(
        leaf(value), case.shapes, valid_sizes.to(device), leaf(reference).detach(), leaf(offsets),
        leaf(logits), padding.to(device), leaf(locations), leaf(weights), grad.to(device),
    )  # fmt: skip


def _pad(case: Case) -> tuple[Tensor, Tensor]:
    """(valid_sizes, padding) where every second image is a tenth narrower than the canvas."""
    sides = torch.tensor([[w, h] for h, w in case.shapes]).float()
    valid_sizes = sides.repeat(case.batch, 1, 1)
    valid_sizes[1::2, :, 0] = (valid_sizes[1::2, :, 0] * 0.9).ceil()
    padding = []
    for level, (height, width) in enumerate(case.shapes):
        is_outside = torch.arange(width) >= valid_sizes[:, level, :1]  # [B, w]
        padding.append(is_outside[:, None].expand(-1, height, -1).flatten(1))
    return valid_sizes, torch.cat(padding, dim=1)


def _grid(shapes, valid_sizes) -> Tensor:
    """[B, S, 2]: the middle of each cell of each level."""
    points = []
    for level, (height, width) in enumerate(shapes):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        middle = torch.stack((x, y), dim=-1).flatten(0, 1) + 0.5
        points.append(middle / valid_sizes[:, level, None])
    return torch.cat(points, dim=1)


def _boxes(rand, queries: int) -> Tensor:
    """[1, Q, 4] with sides of 2 to 60 % of the image, small ones more often."""
    size = 0.02 * 30 ** rand(1, queries, 2)
    return torch.cat((rand(1, queries, 2), size), dim=-1)


@functools.lru_cache
def sides_of(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(w, h) of the levels, [levels, 2], made once: a copy to the device waits for all its work."""
    return torch.tensor([[w, h] for h, w in shapes], device=device).float()


def locate(shapes, valid_sizes, reference, offsets) -> Tensor:
    """Locations by the arithmetic of 2010.04159, as in common libraries."""
    points = offsets.shape[4]
    sides = sides_of(shapes, offsets.device)
    ratios = (valid_sizes / sides)[:, None, None, :, None]  # [B, 1, 1, levels, 1, 2]
    place, offsets = reference[:, :, None, None, None], offsets.float()
    if reference.shape[-1] == 2:
        return place * ratios + offsets / sides[:, None]
    return place[..., :2] * ratios + offsets / points * (place[..., 2:] * ratios) * 0.5


def normalize(logits: Tensor, levels: int) -> Tensor:
    """Weights [B, Q, H, levels, P]."""
    return logits.float().softmax(-1).unflatten(-1, (levels, -1))


def in_float32(x: Inputs) -> Inputs:
    """The same values in float32, to detect errors of bfloat16."""
    names = ("value", "offsets", "logits", "grad")
    floats = {name: getattr(x, name).detach().float().requires_grad_() for name in names}
    return replace(x, **floats | {"grad": floats["grad"].detach()})


def bytes_and_operations(case: Case, measure: str) -> tuple[int, int]:
    """Return the minimum bytes to read and write, and the number of operations.

    For the whole module ("module": both directions), if only its inputs are kept. The
    gradient of the value is summed in float32 whatever its type: zeros written, sums read and
    written.
    """
    levels = len(case.shapes)
    tokens = sum(h * w for h, w in case.shapes)
    queries = case.queries or tokens
    size = 4 if case.dtype == "float32" else 2
    samples = case.batch * queries * HEADS * levels * POINTS
    value = case.batch * tokens * HEADS * CHANNELS
    output = case.batch * queries * HEADS * CHANNELS
    forward_work = samples * (8 * CHANNELS + 30)
    backward_work = samples * (24 * CHANNELS + 60)
    backward_value = value * (size + 12)
    if measure == "forward":
        return size * (value + output) + 12 * samples, forward_work
    if measure == "backward":
        return backward_value + size * output + 24 * samples, backward_work
    inputs = 3 * size * samples  # offsets and logits
    forward = size * (value + output) + inputs
    backward = backward_value + size * output + 2 * inputs
    return {
        "module forward": (forward, forward_work),
        "module backward": (backward, backward_work),
        "module": (forward + backward, forward_work + backward_work),
    }[measure]
