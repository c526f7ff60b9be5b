"""Tensors that are made once."""

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dn_detr.layers.constants import constant


def test_real_tensors_and_those_of_a_tracer_do_not_meet():
    """Counting a detector failed where one had run before in the same process."""
    key = ((1.0, 2.0), torch.float32, torch.device("cpu"))
    real = constant(*key)
    assert constant(*key) is real
    with FakeTensorMode():
        assert isinstance(constant(*key), FakeTensor)
    assert constant(*key) is real
