"""Inputs of deformable attention from references, offsets and logits, and what must come out."""

from typing import NamedTuple

import torch
from attention_cases import SHAPES, by_grid_sample, by_loops
from torch import Tensor


class Inputs(NamedTuple):
    """The arguments of `deformable_attention`."""

    value: Tensor
    shapes: tuple
    valid_sizes: Tensor
    reference: Tensor
    offsets: Tensor
    logits: Tensor
    padding: Tensor | None

    @property
    def leaves(self):
        return self.value, self.reference, self.offsets, self.logits

    def like(self, function):
        """These inputs with `function` of each of their leaves, as new leaves."""
        value, reference, offsets, logits = (
            function(x.detach()).requires_grad_() for x in self.leaves
        )
        return self._replace(value=value, reference=reference, offsets=offsets, logits=logits)


def make_inputs(
    batch=2,
    queries=5,
    heads=3,
    channels=4,
    points=3,
    shapes=SHAPES,
    coordinates=2,
    per_level=False,
    is_padded=True,
    dtype=torch.float64,
    offset_dtype=None,
    device="cpu",
    seed=0,
):
    """Samples in and around the unpadded part of each level; images of a batch differ in it."""
    generator = torch.Generator().manual_seed(seed)
    precise = torch.float64 if dtype == torch.float64 else torch.float32

    def rand(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    levels = len(shapes)
    value = rand(batch, sum(h * w for h, w in shapes), heads, channels) * 2 - 1
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64).view(1, levels, 2)
    share = (torch.arange(batch).view(-1, 1, 1) % 2) * 0.4 if is_padded else 0.0
    valid_sizes = (sizes * (1 - share)).ceil().expand(batch, levels, 2).contiguous()
    reference = rand(batch, queries, *([levels] if per_level else []), coordinates)
    reach = 4.0 if coordinates == 4 else 2.5
    offsets = (rand(batch, queries, heads, levels, points, 2) * 2 - 1) * reach
    logits = rand(batch, queries, heads, levels * points) * 6 - 3
    padding = outside(valid_sizes, shapes).to(device) if is_padded else None
    offset_dtype = offset_dtype or precise
    value, reference, offsets, logits = (
        x.to(device, t).requires_grad_()
        for x, t in (
            (value, dtype), (reference, precise), (offsets, offset_dtype), (logits, offset_dtype)
        )
    )  # fmt: skip
    valid_sizes = valid_sizes.to(device, precise)
    return Inputs(value, shapes, valid_sizes, reference, offsets, logits, padding)


def outside(valid_sizes, shapes):
    """[B, S] bool: cells to the right of or below the unpadded part of their level."""
    masks = []
    for level, (height, width) in enumerate(shapes):
        row, column = torch.arange(height).view(-1, 1), torch.arange(width)
        w, h = valid_sizes[:, level, 0, None, None], valid_sizes[:, level, 1, None, None]
        masks.append(((column >= w) | (row >= h)).flatten(1))
    return torch.cat(masks, dim=1)


def away_from_whole_cells(inputs):
    """The inputs with offsets such that no sample is nearer than 0.2 to where gradients jump."""
    with torch.no_grad():
        sizes = sizes_of(inputs)
        cells = locations_of(inputs) * sizes - 0.5
        cells = cells.floor() + 0.2 + 0.6 * (cells - cells.floor())
        _, centre, scale = parts_of(inputs)
        offsets = ((cells + 0.5) - centre) / scale
    return inputs._replace(offsets=offsets.requires_grad_())


def sizes_of(inputs):
    """(w, h) of the levels, [levels, 1, 2]."""
    sizes = [(w, h) for h, w in inputs.shapes]
    return torch.tensor(sizes, dtype=inputs.reference.dtype).view(-1, 1, 2)


def parts_of(inputs):
    """Valid sizes, centres in cells, cells per unit of an offset: [B, Q or 1, 1, levels, 1, 2]."""
    reference = inputs.reference
    if reference.ndim == 3:
        reference = reference[:, :, None].expand(-1, -1, len(inputs.shapes), -1)
    reference = reference[:, :, None, :, None]
    valid = inputs.valid_sizes[:, None, None, :, None]
    points = inputs.offsets.shape[4]
    scale = reference[..., 2:] / 2 / points * valid if reference.shape[-1] == 4 else 1.0
    return valid, reference[..., :2] * valid, scale


def locations_of(inputs):
    """[B, Q, H, levels, P, 2] in [0, 1] of the padded levels (2010.04159, appendix A.1 and A.4)."""
    _, centre, scale = parts_of(inputs)
    return (centre + inputs.offsets * scale) / sizes_of(inputs)


def weights_of(inputs):
    """[B, Q, H, levels, P]."""
    weights = inputs.logits.exp() / inputs.logits.exp().sum(-1, keepdim=True)
    return weights.unflatten(-1, inputs.offsets.shape[3:5])


def unpadded_value(inputs):
    if inputs.padding is None:
        return inputs.value
    return torch.where(inputs.padding[:, :, None, None], 0.0, inputs.value)


def by_definition(*arguments):
    """[B, Q, H * D] one sample and one corner at a time."""
    inputs = Inputs(*arguments)
    return by_loops(unpadded_value(inputs), inputs.shapes, locations_of(inputs), weights_of(inputs))


def by_sampling_a_grid(*arguments):
    """[B, Q, H * D] from softmax and `grid_sample` in the inputs' type: what libraries do."""
    inputs = Inputs(*arguments)
    return by_grid_sample(
        unpadded_value(inputs), inputs.shapes, locations_of(inputs), weights_of(inputs)
    )


def run(function, inputs, grad_output=None):
    """(output, and the gradients of value, reference, offsets and logits)."""
    output = function(*inputs)
    if grad_output is None:
        generator = torch.Generator().manual_seed(9)
        grad_output = torch.rand(output.shape, generator=generator, dtype=torch.float64) - 0.5
    grad_output = grad_output.to(output.device, output.dtype)
    return output, *torch.autograd.grad(output, inputs.leaves, grad_output)
