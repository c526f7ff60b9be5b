"""What only a GPU shows of deformable attention. What it computes is tested beside the CPU.

`make emulate` runs those tests of them that need no GPU but its kernels.
"""

import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from deformable_cases import away_from_whole_cells, make_inputs, run

from dn_detr.ops import deformable_attention, deformable_attention_pytorch
from dn_detr.ops.extension import KERNELS, read_record

IS_EMULATED = bool((read_record() or {}).get("emulated"))  # see dev/cuda_emulator
DEVICE = "cpu" if IS_EMULATED else "cuda"
pytestmark = pytest.mark.skipif(
    not (IS_EMULATED or torch.cuda.is_available())
    or DEVICE not in KERNELS.get("deformable_attention", ()),
    reason="no GPU, or no kernel for it",
)
needs_gpu = pytest.mark.skipif(IS_EMULATED, reason="needs a GPU")

# No side is a multiple of a tile's, some are smaller.
PYRAMID = ((19, 27), (10, 14), (5, 7), (3, 4))
ENCODER = {"shapes": PYRAMID, "queries": sum(h * w for h, w in PYRAMID), "heads": 8, "channels": 32}
DECODER = {**ENCODER, "queries": 300, "coordinates": 4}
CASES = pytest.mark.parametrize("case", [ENCODER, DECODER], ids=["encoder", "decoder"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@contextmanager
def deterministic():
    """Only around kernels: grid_sample has no deterministic backward on a GPU."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def moved(inputs, device, dtype=None):
    """The inputs on another device, the floating point ones in another type."""
    return inputs.like(lambda x: x.to(device, dtype))._replace(
        valid_sizes=inputs.valid_sizes.to(device, dtype), padding=inputs.padding.to(device)
    )


def on_gpu(**sizes):
    """Away from whole cells: there, a rounding error can make another gradient."""
    return moved(away_from_whole_cells(make_inputs(**{"dtype": torch.float32, **sizes})), DEVICE)


@CASES
@DTYPES
@pytest.mark.parametrize("heads", [1, 3, 6, 8])
def test_every_query_and_head_is_done_once_in_any_order(case, dtype, heads):
    inputs = on_gpu(**{**case, "heads": heads, "dtype": dtype})
    grad_output = torch.randn(deformable_attention(*inputs).shape).to(dtype)  # rounded for both
    results = run(deformable_attention, inputs, grad_output)
    precise = moved(inputs, "cpu", torch.float64)
    expected = run(deformable_attention_pytorch, precise, grad_output)
    for got, want in zip(results, expected, strict=True):
        tolerance = 2e-4 if got.dtype == torch.float32 else 4 * torch.finfo(got.dtype).eps
        scale = want.abs().max()
        torch.testing.assert_close(
            got.double().cpu() / scale, want / scale, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("channels", [8, 16, 32, 64, 96, 128, 160, 256, 512, 31])
@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_channels(channels, is_deterministic, dtype):
    inputs = on_gpu(heads=2, channels=channels, queries=37, dtype=dtype)
    with deterministic() if is_deterministic else nullcontext():
        results = run(deformable_attention, inputs)
    expected = run(deformable_attention_pytorch, inputs)
    for got, want in zip(results, expected, strict=True):
        tolerance = max(1e-3, torch.finfo(got.dtype).eps)  # of one rounding
        atol = tolerance / 10 * want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=tolerance, atol=atol)


@CASES
@DTYPES
def test_deterministic_backward_gives_the_same_bits(case, dtype):
    inputs = on_gpu(**{**case, "dtype": dtype})
    with deterministic():
        first, *others = (run(deformable_attention, inputs) for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_deterministic_backward_is_as_precise():
    """Gradients of very different sizes: small ones are not lost beside large ones."""
    inputs = on_gpu(**DECODER)
    grad_output = torch.randn(2, 300, 256).double()
    grad_output[:, ::2] *= 1e-6
    with deterministic():
        results = run(deformable_attention, inputs, grad_output)
    expected = run(deformable_attention_pytorch, moved(inputs, DEVICE, torch.float64), grad_output)
    for got, want in zip(results, expected, strict=True):
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_deterministic_backward_does_not_hide_infinity():
    inputs = on_gpu(**DECODER)
    grad_output = torch.zeros(2, 300, 256)
    grad_output[0, 0, 0] = torch.inf
    with deterministic():
        grad_value = run(deformable_attention, inputs, grad_output)[1]
    assert not torch.isfinite(grad_value).all()


def test_asking_only_for_warnings_gives_none():
    """There is a deterministic kernel, so nothing has to be warned of."""
    inputs = on_gpu(**DECODER)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first, second = (run(deformable_attention, inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_gpu
@CASES
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_nothing_waits_for_the_gpu(case, is_deterministic):
    inputs = on_gpu(**{**case, "dtype": torch.bfloat16})
    grad_output = torch.randn_like(deformable_attention(*inputs))
    torch.use_deterministic_algorithms(is_deterministic)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(deformable_attention(*inputs), inputs.leaves, grad_output)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)


@needs_gpu
@CASES
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_a_cuda_graph_computes_with_what_its_inputs_hold_then(case, is_deterministic):
    inputs, other = on_gpu(**case), on_gpu(**{**case, "seed": 1})
    grad_output = torch.randn_like(deformable_attention(*inputs))
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        expected = run(deformable_attention, other, grad_output)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(deformable_attention, inputs, grad_output)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run(deformable_attention, inputs, grad_output)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.no_grad():
        for mine, new in zip(inputs, other, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(new)
    graph.replay()
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@needs_gpu
def test_work_is_queued_on_the_current_stream():
    inputs = on_gpu(**ENCODER)
    expected = deformable_attention(*inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # an output of the default stream would not wait for it
        late = inputs._replace(value=inputs.value * 2)
        output = deformable_attention(*late)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(output, 2 * expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one():
    inputs = on_gpu(**DECODER)
    expected = run(deformable_attention, inputs)
    results = run(deformable_attention, moved(inputs, "cuda:1"))
    for got, want in zip(results, expected, strict=True):
        assert got.device == torch.device("cuda:1")
        torch.testing.assert_close(got.cpu(), want.cpu(), rtol=1e-4, atol=1e-4)


@needs_gpu  # 17 million threads take minutes in the emulator
def test_more_images_than_a_grid_is_deep():
    sizes = {"heads": 1, "channels": 4, "points": 1, "queries": 1, "shapes": ((1, 2),)}
    inputs = on_gpu(batch=65_537, **sizes)
    results = run(deformable_attention, inputs)
    expected = run(deformable_attention_pytorch, inputs)
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
