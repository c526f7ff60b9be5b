"""The operators as torch.library sees them: opcheck, torch.compile, torch.export."""

import deformable_cases
import pytest
import torch
from attention_cases import make_inputs

from dn_detr.ops import (
    deformable_attention,
    deformable_attention_pytorch,
    ms_deform_attn,
    noise_objects,
    pytorch_operators,
)
from dn_detr.ops.extension import KERNELS

needs_kernels = pytest.mark.skipif(not KERNELS, reason="dn_detr._C is not built")
NOISE = {
    "num_classes": 9,
    "box_noise": 0.4,
    "label_noise": 0.5,
    "contrastive": True,
    "num_matched": 3,
    "mask_dtype": torch.float32,
}


def noise_inputs(batch=2, most=5, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(9, (batch, most), generator=generator)
    boxes = torch.rand(batch, most, 4, generator=generator)
    is_object = torch.arange(most) < torch.randint(1, most + 1, (batch, 1), generator=generator)
    keys = torch.randint(1 << 62, (batch,), generator=generator)
    return tuple(x.to(device) for x in (labels, boxes, is_object, keys))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck_of_ms_deform_attn(kernel_device, dtype):
    value, shapes, locations, weights = make_inputs(dtype=dtype, device=kernel_device)
    sides = [side for shape in shapes for side in shape]
    arguments = (value, sides, locations, weights)
    torch.library.opcheck(torch.ops.dn_detr.ms_deform_attn.default, arguments)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    grad_output = torch.rand(2, 5, 12, device=kernel_device).to(dtype)
    torch.library.opcheck(
        torch.ops.dn_detr.ms_deform_attn_backward.default, (grad_output, *detached)
    )


@needs_kernels
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize(
    ("dtype", "coordinates", "per_level"),
    [
        (torch.float32, 2, False),
        (torch.float64, 4, False),
        (torch.bfloat16, 4, True),
        (torch.float32, 2, True),
    ],
)
def test_opcheck_of_deformable_attention(deform_device, dtype, coordinates, per_level, is_padded):
    inputs = deformable_cases.make_inputs(
        dtype=dtype,
        offset_dtype=dtype,
        coordinates=coordinates,
        per_level=per_level,
        is_padded=is_padded,
        device=deform_device,
    )
    inputs = inputs._replace(shapes=[side for shape in inputs.shapes for side in shape])
    torch.library.opcheck(torch.ops.dn_detr.deformable_attention.default, tuple(inputs))
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    grad_output = torch.rand(2, 5, 12, device=deform_device).to(dtype)
    for needs_reference in (False, True):
        torch.library.opcheck(
            torch.ops.dn_detr.deformable_attention_backward.default,
            (grad_output, *detached, needs_reference),
        )


@needs_kernels
@pytest.mark.parametrize("slots", [5, 2, 0])
def test_opcheck_of_noise(kernel_device, slots):
    torch.library.opcheck(
        torch.ops.dn_detr.noise_objects.default,
        (*noise_inputs(device=kernel_device), 4, slots, *NOISE.values(), True),
    )


@needs_kernels
def test_compiled_noise_keeps_off_the_memory_of_earlier_masks():
    """A compiled graph writes into results that it no longer needs, and nobody would notice."""

    class Noised(torch.nn.Module):
        def forward(self, *inputs):
            return noise_objects(*inputs, num_groups=2, slots_per_group=5, **NOISE)

    exported = torch.export.export(Noised(), noise_inputs())
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "dn_detr.noise_objects.default" in names


class Sampler(torch.nn.Module):
    """Two maps of any size [B, 8, h, w] as levels, sampled at one place per cell and level."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, fine, coarse):
        shapes = [(x.shape[2], x.shape[3]) for x in (fine, coarse)]
        value = torch.cat([x.flatten(2).transpose(1, 2) for x in (fine, coarse)], dim=1)
        locations = value[:, :, :4].sigmoid().unflatten(2, (1, 2, 1, 2))
        weights = value[:, :, 4:6].softmax(-1).unflatten(2, (1, 2, 1))
        return self.function(value[:, :, None], shapes, locations, weights)


class Attention(torch.nn.Module):
    """Two maps of any size [B, 8, h, w] as levels, of which every cell asks around itself."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, fine, coarse):
        shapes = [(x.shape[2], x.shape[3]) for x in (fine, coarse)]
        value = torch.cat([x.flatten(2).transpose(1, 2) for x in (fine, coarse)], dim=1)
        ones = [torch.ones_like(x[:, 0, :, 0]).sum(1) for x in (fine, coarse)]
        heights = torch.stack(ones, dim=1)
        ones = [torch.ones_like(x[:, 0, 0, :]).sum(1) for x in (fine, coarse)]
        valid_sizes = torch.stack((torch.stack(ones, dim=1), heights), dim=-1)
        reference = value[:, :, :4].sigmoid()
        offsets = value.unflatten(2, (1, 2, 2, 2))
        logits = value[:, :, None, 2:6]
        padding = value[:, :, 7] < 0.2
        return self.function(
            value[:, :, None], shapes, valid_sizes, reference, offsets, logits, padding
        )


MODELS = [
    pytest.param(Sampler(ms_deform_attn), id="ms_deform_attn"),
    pytest.param(Attention(deformable_attention), id="deformable_attention"),
    pytest.param(Attention(deformable_attention_pytorch), id="deformable_attention_pytorch"),
]


def make_maps(batch, height, width):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.rand(batch, 8, *size, generator=generator).requires_grad_()
        for size in ((height, width), (height // 2, width // 2 - 1))
    )


SIZES = ((2, 6, 10), (5, 13, 9), (3, 32, 64))


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_compiled_graph_serves_all_image_sizes(model, backend):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for size in SIZES:
        maps = make_maps(*size)
        outputs = compiled(*maps), model(*maps)
        torch.testing.assert_close(outputs[0], outputs[1])
        gradients = [torch.autograd.grad(x.square().sum(), maps) for x in outputs]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("model", MODELS)
def test_exported_graph_serves_all_batches_and_image_sizes(model):
    batch = torch.export.Dim("batch", max=8)
    sides = [torch.export.Dim(name, max=128) for name in ("h0", "w0", "h1", "w1")]
    sizes = ({0: batch, 2: sides[0], 3: sides[1]}, {0: batch, 2: sides[2], 3: sides[3]})
    exported = torch.export.export(model, make_maps(*SIZES[0]), dynamic_shapes=sizes).module()
    for size in SIZES:
        maps = make_maps(*size)
        torch.testing.assert_close(exported(*maps), model(*maps))


@pytest.mark.parametrize("function", [ms_deform_attn, deformable_attention])
def test_inside_of_plain_operators_a_graph_has_standard_operators_only(function):
    model = (Sampler if function is ms_deform_attn else Attention)(function)
    maps = make_maps(*SIZES[0])

    def operators_of_ours():
        graph = torch.export.export(model, maps).graph
        return [node for node in graph.nodes if "dn_detr" in str(node.target)]

    with pytorch_operators():
        assert not operators_of_ours()
        inside = model(*maps)
    assert len(operators_of_ours()) == (1 if "cpu" in KERNELS.get(function.__name__, ()) else 0)
    torch.testing.assert_close(inside, model(*maps))


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_noise_compiles_once_for_all_numbers_of_objects(backend):
    torch._dynamo.reset()

    def noised(labels, boxes, is_object, keys):
        slots = labels.shape[1]
        return noise_objects(
            labels, boxes, is_object, keys, num_groups=24 // slots, slots_per_group=slots, **NOISE
        )

    compiled = torch.compile(noised, fullgraph=True, dynamic=True, backend=backend)
    for batch, most in ((2, 5), (3, 7), (5, 11)):
        inputs = noise_inputs(batch, most)
        for got, want in zip(compiled(*inputs), noised(*inputs), strict=True):
            torch.testing.assert_close(got, want)
