"""Frozen batch norms that share the computation of scale and shift equal Detectron2's."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.testing import assert_close

from dn_detr.d2.modeling.frozen_norm import join_frozen_norms


def backbone():
    torch.manual_seed(0)
    layers = [
        Conv2d(3, 4, 3, norm=FrozenBatchNorm2d(4)),
        Conv2d(4, 5, 3, norm=FrozenBatchNorm2d(5)),
    ]
    for layer in layers:
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(layer.norm, name).uniform_(0.5, 2)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("is_training", [True, False])
def test_outputs_and_gradients_equal_those_of_detectron2(is_training):
    plain = backbone().train(is_training)
    joined = copy.deepcopy(plain)
    join_frozen_norms(joined)
    joined = copy.deepcopy(joined)  # as the moving average of the weights does
    assert list(joined.state_dict()) == list(plain.state_dict())
    for scale in (1, 3):  # statistics are read anew in every forward
        found = []
        for model in (plain, joined):
            model[1].norm.running_var.fill_(scale)
            model.zero_grad()
            out = model(torch.linspace(-1, 1, 2 * 3 * 49).double().view(2, 3, 7, 7))
            out.square().sum().backward()
            found.append([out, *(parameter.grad for parameter in model.parameters())])
        for theirs, ours in zip(*found, strict=True):
            assert_close(ours, theirs)


def test_outputs_keep_the_dtype_of_autocast():
    model = backbone().float().train()
    join_frozen_norms(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(1, 3, 7, 7))
    assert out.dtype == torch.bfloat16
