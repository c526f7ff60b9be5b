"""dev/cuda_emulator notices what a GPU may not: each kernel here has one fault, or none."""

import ctypes
import importlib
import platform
import re
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64"
)
FOLDER = Path(__file__).resolve().parents[2] / "dev" / "cuda_emulator"

HEAD = """
#include <cuda_runtime.h>
#include <exception>
#include <string>
namespace emulator { void* allocate(size_t size); }
float host_number;
static std::string message;
template <typename F> static const char* message_of(const F& f) {
  try { f(); message = ""; } catch (const std::exception& e) { message = e.what(); }
  return message.c_str();
}
static float* tensor(int count) { return static_cast<float*>(emulator::allocate(4 * count)); }
"""

# Name: (body of a kernel with `float* x`, grid and threads, a part of the message or "").
# x has 64 numbers. Blocks of 64 threads use numbers of their own unless the fault is to share them.
KERNELS = {
    "nothing": ("x[threadIdx.x] = 1;", "1, 64", ""),
    "past the end": ("x[threadIdx.x + 1] = 1;", "1, 64", "write of 4 bytes at byte 256 of 256"),
    "before the start": ("x[-1] = 1;", "1, 1", "out of bounds"),
    "misaligned": ("*(uint4*)(x + 1) = uint4{};", "1, 1", "misaligned: write of 16 bytes"),
    "misaligned load": ("x[0] = __ldg((const float2*)(x + 1)).x;", "1, 1", "misaligned: read of 8"),
    "address of the host": ("host_number = x[0];", "1, 1", "no tensor or shared variable"),
    "reversal": (
        "__shared__ float y[64]; y[threadIdx.x] = threadIdx.x; __syncthreads();"
        "x[threadIdx.x] = y[63 - threadIdx.x];", "1, 64", ""),
    "reversal without a barrier": (
        "__shared__ float y[64]; y[threadIdx.x] = threadIdx.x;"
        "x[threadIdx.x] = y[63 - threadIdx.x];", "1, 64", "race with thread"),
    "reversal in a warp": (
        "__shared__ float y[32]; y[threadIdx.x] = threadIdx.x; __syncwarp();"
        "x[threadIdx.x] = y[31 - threadIdx.x];", "1, 32", ""),
    "a barrier of a warp between warps": (
        "__shared__ float y[64]; y[threadIdx.x] = threadIdx.x; __syncwarp();"
        "x[threadIdx.x] = y[63 - threadIdx.x];", "1, 64", "race with thread"),
    "overwritten before all have read": (
        "__shared__ float y; for (int i = 0; i < 2; ++i) {"
        " if (threadIdx.x == 0) y = i; __syncthreads(); x[threadIdx.x] += y; }", "1, 64", "race"),
    "shared memory is not zero": (
        "__shared__ float y; if (y == 0) *(float*)nullptr = 1;", "1, 32", ""),
    "beyond a shared variable": (
        "__shared__ float y[8]; y[threadIdx.x] = 1;", "1, 9", "at byte 32 of 32"),
    "sum": ("x[0] += 1;", "1, 64", "race with thread"),
    "atomic sum": ("atomicAdd(x, 1.f);", "2, 64", ""),
    "sum over blocks": ("x[0] += 1;", "2, 1", "race with thread"),
    "atomic sum that is read": (
        "atomicAdd(x, 1.f); if (threadIdx.x == 5) x[1] = x[0];", "1, 64", "race"),
    "the same number from all": ("x[0] = 3;", "4, 64", ""),
    "another number from each": ("x[0] = threadIdx.x;", "1, 64", "race with thread"),
    "half a barrier": ("if (threadIdx.x < 32) __syncthreads();", "1, 64", "do not meet"),
    "two barriers": (
        "if (threadIdx.x < 32) {__syncthreads();}\\n else {__syncthreads();}", "1, 64",
        "do not meet at one barrier"),
    "a barrier after some have ended": (
        "if (threadIdx.x == 9) return; __syncthreads();", "1, 64", "do not meet at one barrier"),
    "sum by shuffles": (
        "float y = 1; for (int d = 16; d > 0; d /= 2) y += __shfl_xor_sync(~0u, y, d);"
        "if (y != 32) x[64] = 0;", "1, 64", ""),
    "shuffle in part of a warp": (
        "if (threadIdx.x < 16) x[threadIdx.x] = __shfl_sync(~0u, 1.f, 0);", "1, 32", "has ended"),
    "shuffle with the mask of that part": (
        "if (threadIdx.x < 16) x[threadIdx.x] = __shfl_sync(0xffffu, 1.f, 0);", "1, 32", ""),
    "shuffle from outside of the mask": (
        "if (threadIdx.x < 16) __shfl_sync(0xffffu, 1.f, 16);", "1, 32", "lane 16 of a shuffle"),
    "lane without itself": ("__shfl_sync(1u, 1.f, 0);", "1, 32", "is not in its mask"),
    "different masks": (
        "__shfl_sync(threadIdx.x < 16 ? ~0u : 0xffff0000u, 1.f, 20);", "1, 32",
        "different masks|has ended"),
    "shuffle against barrier": (
        "if (threadIdx.x < 16) { __shfl_sync(~0u, 1.f, 0); } __syncthreads();", "1, 32",
        "no thread can go on"),
    "part of a warp": ("__shfl_sync(~0u, 1.f, 0);", "1, 40", "does not exist"),
    "votes": (
        "if (__ballot_sync(~0u, threadIdx.x < 3) != 7 || __all_sync(~0u, threadIdx.x < 3) ||"
        " !__any_sync(~0u, threadIdx.x < 3)) x[64] = 0;", "1, 32", ""),
    "count": ("if (__syncthreads_count(threadIdx.x < 40) != 40) x[64] = 0;", "3, 64", ""),
    "no block": ("", "0, 64", "cannot launch a grid of 0"),
    "too many threads": ("", "1, 1025", "blocks of 1025"),
    "too many columns of blocks": ("", "dim3(1, 65536), 1", "cannot launch a grid of 1 x 65536"),
    "more threads than compiled for": ("", "1, 257", "launched with 257 threads, compiled for 256"),
    "too much shared memory": (
        "__shared__ float y[12289]; y[0] = 1;", "1, 1", "49156 bytes of shared"),
    "dynamic shared memory": (
        "extern __shared__ float y[]; y[threadIdx.x] = 1;", "1, 64, 256", ""),
    "beyond dynamic shared memory": (
        "extern __shared__ float y[]; y[threadIdx.x] = 1;", "1, 64, 252", "at byte 252 of 252"),
    "assertion": ("CUDA_KERNEL_ASSERT(threadIdx.x != 3);", "1, 64", "assertion threadIdx.x != 3"),
}  # fmt: skip


def load(name):
    """A module of the emulator, whose folder is not on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    link, translate = load("build").link, load("translate").translate
    folder = tmp_path_factory.mktemp("emulator")
    parts = [HEAD]
    for i, (body, config, _) in enumerate(KERNELS.values()):
        body = body.replace("\\n", "\n")
        parts.append(
            f"__global__ void __launch_bounds__(256) k{i}(float* x) {{ {body} }}\n"
            f'extern "C" __attribute__((visibility("default"))) const char* run{i}() {{'
            f" float* x = tensor(64); return message_of([&] {{ k{i}<<<{config}>>>(x); }}); }}\n"
        )
    source = folder / "kernels.cpp"
    source.write_text(translate("".join(parts), "kernels.cu"))
    link([source], folder / "objects", folder / "kernels.so", [], [], 1)
    return ctypes.CDLL(str(folder / "kernels.so"))


@pytest.mark.parametrize("name", KERNELS)
def test_a_fault_is_noticed_and_nothing_else(library, name):
    run = getattr(library, f"run{list(KERNELS).index(name)}")
    run.restype = ctypes.c_char_p
    for _ in range(4):  # each order of threads
        message = run().decode()
        expected = KERNELS[name][2]
        assert re.search(expected, message) if expected else (not message), message


def test_ptx_without_c_is_refused():
    translate = load("translate").translate
    with pytest.raises(ValueError, match="no C\\+\\+ for the PTX 'red.add"):
        translate('asm("red.add.f64 [%0], %1;" :: "l"(a), "d"(b));', "x.cu")
