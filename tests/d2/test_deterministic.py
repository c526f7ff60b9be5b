"""DETERMINISTIC on a GPU: no operator of a training step is one that PyTorch refuses there."""

import importlib

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from samples import sample, with_teacher
from test_configs import NAMES, read
from torch.utils._python_dispatch import TorchDispatchMode

import dn_detr.d2  # noqa: F401

REFUSED = {
    *("cumsum", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "histc", "put_"),
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward"),
    *("upsample_bicubic2d_backward", "upsample_trilinear3d_backward"),
    *("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("adaptive_max_pool2d_backward", "avg_pool3d_backward", "max_pool3d_with_indices_backward"),
    *("fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
    *("max_unpool2d", "max_unpool3d", "nll_loss2d_forward", "_ctc_loss_backward"),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward"),
    *("_embedding_bag_dense_backward", "kthvalue", "median", "bincount", "resize_as_"),
    *("roi_align", "_roi_align_backward"),
}
"""Operators for which `torch.use_deterministic_algorithms` raises on CUDA, by its documentation
(cumsum: of floats), and torchvision's, which has another way in that mode."""


class Recorder(TorchDispatchMode):
    """Names of the operators that are called, forward and backward."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        if name != "cumsum" or args[0].is_floating_point():
            self.names.add(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """PyTorch and torchvision replace what is not deterministic by other operators where a tensor
    is on a GPU: here the replacements run on the CPU."""
    decompositions = importlib.import_module("torch._decomp.decompositions")

    def interpolate(input, size=None, scale_factor=None, mode="nearest", **options):
        if mode == "bilinear":
            scales = None if scale_factor is None else [scale_factor] * 2
            return decompositions._upsample_linear_vec(input, size, False, scales)
        return real(input, size, scale_factor, mode, **options)

    real = torch.nn.functional.interpolate
    monkeypatch.setattr(torch.nn.functional, "interpolate", interpolate)
    module = importlib.import_module("torchvision.ops.roi_align")
    monkeypatch.setattr(
        importlib.import_module("detectron2.layers.roi_align"),
        "roi_align",
        lambda input, rois, size, scale, ratio, aligned: module._roi_align(
            input, rois, scale, *size, ratio, aligned
        ),
    )
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("quick/")])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_training_step_calls_no_operator_that_is_refused(name):
    torch.manual_seed(0)
    model = build_model(read(name))
    batch = [with_teacher(sample(image, count), count) for image, count in enumerate((3, 1))]
    with EventStorage(), Recorder() as recorder:
        sum(model(batch).values()).backward()
    assert not recorder.names & REFUSED
    assert "convolution_backward" in recorder.names
