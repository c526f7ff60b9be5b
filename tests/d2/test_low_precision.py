"""Weights that are cast once per forward give what autocast gives."""

import copy

import torch
from torch import nn

from dn_detr.d2.modeling.low_precision import call_in_autocast


class Twice(nn.Module):
    """A linear layer under two names, a convolution, a norm, and a layer that is not used."""

    def __init__(self):
        super().__init__()
        self.linear, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)
        self.stage = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.LayerNorm(6), self.linear)

    def forward(self, x, *, scale):
        return self.stage(self.linear(self.linear(x).relu())) * scale


def test_results_and_gradients_equal_those_of_autocast_bit_for_bit():
    torch.manual_seed(0)
    plain, x = Twice(), torch.randn(3, 2, 5, 6)
    once = copy.deepcopy(plain)
    with torch.autocast("cpu", torch.bfloat16):
        results = plain(x, scale=2.0), call_in_autocast(once, x, scale=2.0)
    assert torch.equal(*results)
    assert all(parameter.is_leaf for parameter in once.parameters())
    for result in results:
        result.square().sum().backward()
    for a, b in zip(plain.parameters(), once.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or (torch.equal(a.grad, b.grad) and b.grad.dtype == torch.float32)
    assert plain.unused.weight.grad is None


def test_nothing_is_cast_without_autocast_or_gradient():
    model, x = Twice(), torch.randn(1, 2, 5, 6)
    assert torch.equal(call_in_autocast(model, x, scale=1.0), model(x, scale=1.0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call_in_autocast(model, x, scale=1.0), model(x, scale=1.0))
