"""Inputs of deformable attention, and what the result must be by plain loops."""

import math

import torch
from torch.nn import functional as F

SHAPES = ((5, 7), (3, 2), (1, 1))

BORDER = [
    (1.0, 1.0, 6.0, 1.0),  # on a cell of [[1, 2, 3, 4], [5, 6, 7, 8]]: right-sided difference
    (3.0, 0.0, 4.0, -4.0),  # last column: its right neighbour is 0
    (-0.5, 0.0, 0.5, 1.0),  # half outside
    (3.5, 1.0, 4.0, -8.0),
    (0.0, -0.5, 0.5, 0.5),
    (-1.0, 0.0, 0.0, 0.0),  # exactly one cell outside: outside
    (4.0, 0.0, 0.0, 0.0),
    (0.0, -1.0, 0.0, 0.0),
    (0.0, 2.0, 0.0, 0.0),
]
"""(x, y, output, gradient for x) of a sample at (x, y), in cells of two rows of four, 1 to 8."""


def make_inputs(
    batch=2,
    queries=5,
    heads=3,
    channels=4,
    points=4,
    shapes=SHAPES,
    dtype=torch.float64,
    device="cpu",
    reach=0.3,
    seed=0,
):
    """(value, shapes, locations, weights), locations in [-reach, 1 + reach], all with gradients."""
    generator = torch.Generator().manual_seed(seed)
    precise = torch.float64 if dtype == torch.float64 else torch.float32

    def rand(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    value = rand(batch, sum(h * w for h, w in shapes), heads, channels) * 2 - 1
    locations = rand(batch, queries, heads, len(shapes), points, 2) * (1 + 2 * reach) - reach
    weights = rand(batch, queries, heads, len(shapes), points)
    value, locations, weights = (
        x.to(device, t).requires_grad_()
        for x, t in ((value, dtype), (locations, precise), (weights, precise))
    )
    return value, shapes, locations, weights


def run(function, inputs, grad_output=None):
    """(output, grad_value, grad_locations, grad_weights), for the same grad_output each time."""
    value, shapes, locations, weights = inputs
    output = function(value, shapes, locations, weights)
    if grad_output is None:
        generator = torch.Generator().manual_seed(9)
        grad_output = torch.rand(output.shape, generator=generator, dtype=torch.float64) - 0.5
    grad_output = grad_output.to(output.device, output.dtype)
    return output, *torch.autograd.grad(output, (value, locations, weights), grad_output)


def by_loops(value, shapes, locations, weights):
    """[B, Q, H * D] from the definition, one sample and one corner at a time (float64 lists)."""
    batch, _, heads, channels = value.shape
    queries, levels, points = locations.shape[1], len(shapes), locations.shape[4]
    cells, where, weight = value.tolist(), locations.tolist(), weights.tolist()
    output = torch.zeros(batch, queries, heads, channels, dtype=torch.float64)
    for b in range(batch):
        for q in range(queries):
            for head in range(heads):
                start = 0
                for level in range(levels):
                    height, width = shapes[level]
                    for p in range(points):
                        x = where[b][q][head][level][p][0] * width - 0.5
                        y = where[b][q][head][level][p][1] * height - 0.5
                        for row in (math.floor(y), math.floor(y) + 1):
                            for column in (math.floor(x), math.floor(x) + 1):
                                if 0 <= row < height and 0 <= column < width:
                                    share = (1 - abs(x - column)) * (1 - abs(y - row))
                                    share *= weight[b][q][head][level][p]
                                    cell = cells[b][start + row * width + column][head]
                                    for c in range(channels):
                                        output[b, q, head, c] += share * cell[c]
                    start += height * width
    return output.flatten(2)


def by_grid_sample(value, shapes, locations, weights):
    """[B, Q, H * D] from `grid_sample`, all samples stacked: what libraries fall back to."""
    batch, _, heads, channels = value.shape
    samples = []
    levels = value.split([h * w for h, w in shapes], dim=1)
    for level, (cells, (height, width)) in enumerate(zip(levels, shapes, strict=True)):
        image = cells.flatten(2).transpose(1, 2).reshape(batch * heads, channels, height, width)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(image, grid, align_corners=False))
    weights = weights.transpose(1, 2).flatten(0, 1).flatten(2)[:, None]
    output = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)
    return output.view(batch, heads * channels, -1).transpose(1, 2)
