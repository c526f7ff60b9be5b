"""Other implementations of multi-scale deformable attention, with one signature.

`find_peers` returns those that are installed or whose path is given. Each is a function
(value [B, S, H, D], shapes, locations [B, Q, H, levels, P, 2], weights [B, Q, H, levels, P])
-> [B, Q, H * D], as `dn_detr.ops.ms_deform_attn`. Additional inputs, such as sizes on the
device, are made once. Implementations without bfloat16, or that would round locations to it, get
the value in float32; the casts are part of their time.
"""

from __future__ import annotations

import functools
import importlib
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

DEFORMOPS_FLOAT32 = "deformops, float32 sums"
FLOAT32_SUMS = {"backend": "triton", "fp32acc": True}
"""deformops sums the value's gradient in float32; its default from sm_90 on is the value's type."""
LOSSY = ("deformops",)
"""Sum in bfloat16 where values are: timed beside their errors, however large."""

Attend = Callable[[Tensor, tuple, Tensor, Tensor], Tensor]


@functools.lru_cache
def sizes(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(shapes [levels, 2], first token of each level [levels]), int64 on the device."""
    areas = [height * width for height, width in shapes]
    starts = [sum(areas[:level]) for level in range(len(areas))]
    return torch.tensor(shapes, device=device), torch.tensor(starts, device=device)


def stacked_grid_sample(value: Tensor, shapes: tuple, locations: Tensor, weights: Tensor) -> Tensor:
    """Stack the samples of all levels, then sum: the usual implementation without a kernel."""
    batch, _, heads, channels = value.shape
    result_type, value = value.dtype, value.float()
    samples, first = [], 0
    for level, (height, width) in enumerate(shapes):
        cells = value[:, first : first + height * width].permute(0, 2, 3, 1)
        grid = locations[:, :, :, level].transpose(1, 2).flatten(0, 1) * 2 - 1
        image = cells.reshape(batch * heads, channels, height, width)
        samples.append(F.grid_sample(image, grid, align_corners=False))
        first += height * width
    weights = weights.transpose(1, 2).flatten(0, 1).flatten(2)  # [B*H, Q, samples]
    output = (torch.cat(samples, dim=-1) * weights[:, None]).sum(-1)  # [B*H, D, Q]
    output = output.view(batch, heads * channels, -1).transpose(1, 2)
    return output.to(result_type, memory_format=torch.contiguous_format)


def find_peers(device: str, paths: dict[str, Path | None]) -> tuple[dict[str, Attend], list[str]]:
    """Return functions by name, and the reasons why others are missing.

    Args:
        paths: checkouts, "original" of Deformable-DETR and "msda_triton" of msda-triton.
    """
    found: dict[str, Attend] = {"grid_sample": stacked_grid_sample}
    missing = []
    finders = {
        "original": lambda: _original(device, paths.get("original")),
        "mmcv": lambda: _mmcv(device),
        "msda-triton": lambda: _msda_triton(device, paths.get("msda_triton")),
        "deformops": lambda: _deformops(),
        DEFORMOPS_FLOAT32: lambda: _deformops(device, **FLOAT32_SUMS),
        "Hugging Face": lambda: _hugging_face(),
    }
    for name, find in finders.items():
        try:
            found[name] = find()
        except (ImportError, OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            missing.append(f"{name}: {reason[-1]}")
    return found, missing


def _original(device: str, folder: Path | None) -> Attend:
    """fundamentalvision/Deformable-DETR, built from its sources, adapted to current torch."""
    if device != "cuda":
        raise ImportError("has no CPU kernel")
    if folder is None:
        raise ImportError("needs the path of its checkout")
    from torch.utils import cpp_extension

    sources = Path(folder) / "models" / "ops" / "src"
    if not sources.is_dir():
        raise ImportError(f"there is no {sources}")
    copy = Path(cpp_extension._get_build_directory("original_ms_deform_attn", False)) / "src"
    for path in (p for p in sources.rglob("*") if p.is_file()):
        text = path.read_text()
        text = re.sub(r"\.type\(\)\.is_cuda\(\)", ".is_cuda()", text)
        text = re.sub(r"TYPES\((\w+)\.type\(\)", r"TYPES(\1.scalar_type()", text)
        text = re.sub(r"\.data<(\w+)>\(\)", r".data_ptr<\1>()", text)
        text = text.replace("<THC/THCAtomics.cuh>", "<ATen/cuda/Atomic.cuh>")
        target = copy / path.relative_to(sources)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() or target.read_text() != text:
            target.write_text(text)
    if shutil.which("nvcc") is None and cpp_extension.CUDA_HOME is None:
        raise ImportError("needs nvcc")
    library = cpp_extension.load(
        "original_ms_deform_attn",
        [str(p) for p in sorted(copy.rglob("*")) if p.suffix in (".cpp", ".cu")],
        extra_include_paths=[str(copy)],
        extra_cflags=["-DWITH_CUDA"],
        extra_cuda_cflags=["-DWITH_CUDA"],
    )

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, shapes, starts, locations, weights):
            ctx.save_for_backward(value, shapes, starts, locations, weights)
            return library.ms_deform_attn_forward(value, shapes, starts, locations, weights, 64)

        @staticmethod
        def backward(ctx, grad):
            saved = ctx.saved_tensors
            grads = library.ms_deform_attn_backward(*saved, grad.contiguous(), 64)
            return grads[0], None, None, grads[1], grads[2]

    def attend(value, shapes, locations, weights):
        output = Function.apply(value.float(), *sizes(shapes, value.device), locations, weights)
        return output.to(value.dtype)

    return attend


def _mmcv(device: str) -> Attend:
    module = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    if device == "cpu":
        function = module.multi_scale_deformable_attn_pytorch
        return lambda value, shapes, locations, weights: function(
            value.float(), sizes(shapes, value.device)[0], locations, weights
        ).to(value.dtype)

    def attend(value, shapes, locations, weights):
        where = sizes(shapes, value.device)
        function = module.MultiScaleDeformableAttnFunction
        output = function.apply(value.float(), *where, locations, weights, 64)
        return output.to(value.dtype)

    return attend


def _msda_triton(device: str, folder: Path | None) -> Attend:
    if device != "cuda":
        raise ImportError("has no CPU kernel")
    if folder is not None:
        sys.path.insert(0, str(Path(folder) / "src" / "msda_triton"))
        # The package requires an installed version; its kernels do not.
        package = type(sys)("msda_triton")
        package.__path__ = [str(Path(folder) / "src" / "msda_triton")]
        sys.modules.setdefault("msda_triton", package)
    module = importlib.import_module("msda_triton.frontend")

    def attend(value, shapes, locations, weights):
        output = module.triton_multiscale_deformable_attention(
            value.float(), sizes(shapes, value.device)[0], locations, weights, "zeros", False
        )
        return output.flatten(2).to(value.dtype)

    return attend


def _deformops(device: str = "cuda", **options) -> Attend:
    if device != "cuda":
        raise ImportError("has no such mode on a CPU")
    registry = importlib.import_module("deformops.registry")

    def attend(value, shapes, locations, weights):
        where = sizes(shapes, value.device)
        return registry.msda(value, *where, locations, weights.to(value.dtype), **options)

    return attend


def deformops_with_softmax(
    value: Tensor, shapes: tuple, locations: Tensor, logits: Tensor, **options
) -> Tensor:
    """Run deformops with its own softmax over logits [B, Q, H, levels * P]."""
    registry = importlib.import_module("deformops.registry")
    where = sizes(shapes, value.device)
    logits = logits.to(value.dtype)
    return registry.msda(value, *where, locations, logits, method="softmax", **options)


def _hugging_face() -> Attend:
    name = "transformers.models.deformable_detr.modeling_deformable_detr"
    module = importlib.import_module(name).MultiScaleDeformableAttention()

    def attend(value, shapes, locations, weights):
        where, starts = sizes(shapes, value.device)
        output = module(value.float(), where, list(shapes), starts, locations, weights, 64)
        return output.to(value.dtype)

    return attend
