#!/usr/bin/env python
"""Measure what atomics and gathers of rows sustain on this GPU: the design of the backward depends.

    python dev/atomic_rates.py --save atomic_rates.json
    python dev/atomic_rates.py --compile-only     # without a GPU: compiles for sm_90, counts RED

Each thread block adds to, or reads, rows of 32 channels at random places: of all cells of an
encoder at two images (spread), or only of its smallest level (hot). Needs nvcc.
See docs/kernel_design.md for the figures that decide.
"""

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = r"""
#include <cstdint>
#include <cuda_runtime.h>
constexpr int THREADS = 256, STEPS = 256;
__device__ uint32_t mix(uint32_t x) {
  x ^= x >> 16; x *= 0x7feb352du; x ^= x >> 15; x *= 0x846ca68bu; return x ^ x >> 16;
}
// Numbers of a thread, and their bytes.
template <int KIND> constexpr int BYTES = KIND == 0 ? 4 : KIND == 3 ? 8 : 16;
template <int KIND> constexpr int ROW = KIND == 2 ? 64 : KIND == 3 ? 256 : 128;

template <int KIND> __global__ void __launch_bounds__(THREADS) work(char* to, uint32_t rows) {
  constexpr int LANES = ROW<KIND> / BYTES<KIND>;
  __shared__ float sums[8192];
  const uint32_t group = (blockIdx.x * THREADS + threadIdx.x) / LANES;
  float kept = 0;
#pragma unroll 4
  for (int i = 0; i < STEPS; ++i) {
    const uint32_t row = __umulhi(mix(group * STEPS + i), rows);
    const size_t shift = size_t{row} * ROW<KIND> + threadIdx.x % LANES * BYTES<KIND>;
    const auto at = __cvta_generic_to_global(to + shift);
    if constexpr (KIND == 0) {
      asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(at), "f"(1.f));
    } else if constexpr (KIND == 1) {
#if __CUDA_ARCH__ >= 900
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %1, %1, %1};" ::"l"(at), "f"(1.f));
#endif
    } else if constexpr (KIND == 2) {
#if __CUDA_ARCH__ >= 900
      asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1, %1, %1, %1};"
                   ::"l"(at), "r"(0x3f803f80));
#endif
    } else if constexpr (KIND == 3) {
      asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(at), "l"(uint64_t{1}));
    } else if constexpr (KIND == 4) {
      const float4 x = __ldg(reinterpret_cast<const float4*>(to + shift));
      kept += x.x + x.y + x.z + x.w;
    } else { // no conflicts: each lane has its own bank
      float* sum = sums + row % 256 * 32 + threadIdx.x % 32;
      *sum += 1.f;
    }
  }
  if (kept == -1.f || (KIND == 5 && sums[threadIdx.x] == -1.f)) to[0] = 1;
}

template <int KIND> float measure(char* to, uint32_t rows, int blocks) {
  cudaEvent_t start, end;
  float best = 1e9f, ms = 0;
  cudaEventCreate(&start); cudaEventCreate(&end);
  for (int i = 0; i < 6; ++i) {
    cudaEventRecord(start);
    work<KIND><<<blocks, THREADS>>>(to, rows);
    cudaEventRecord(end);
    if (cudaEventSynchronize(end) != cudaSuccess || cudaGetLastError() != cudaSuccess) return -1;
    cudaEventElapsedTime(&ms, start, end);
    best = i > 0 && ms < best ? ms : best;
  }
  return best;
}

extern "C" float measure(int kind, uint32_t rows, int blocks) {
  static char* to = nullptr;
  if (to == nullptr && cudaMalloc(&to, size_t{1} << 30) != cudaSuccess) return -1;
  cudaMemset(to, 0, size_t{1} << 30);
  switch (kind) {
    case 0: return measure<0>(to, rows, blocks);
    case 1: return measure<1>(to, rows, blocks);
    case 2: return measure<2>(to, rows, blocks);
    case 3: return measure<3>(to, rows, blocks);
    case 4: return measure<4>(to, rows, blocks);
    default: return measure<5>(to, rows, blocks);
  }
}
"""
KINDS = (
    ("red f32, a row of 128 bytes", 4),
    ("red v4 f32, a row of 128 bytes", 16),
    ("red v4 bf16x2, a row of 64 bytes", 16),
    ("red u64, a row of 256 bytes", 8),
    ("128-bit loads, a row of 128 bytes", 16),
    ("shared memory += f32, not atomic", 4),
)
"""Names, and the bytes of a thread."""
PLACES = {"spread": 2 * 8 * 17821, "hot": 2 * 8 * 204}
"""Rows: images, heads, cells of all levels or of the last one (12 x 17)."""
BLOCKS, THREADS, STEPS = 132 * 64, 256, 256


def compile_library(folder: Path, arch: str) -> Path:
    (folder / "rates.cu").write_text(SOURCE)
    command = ["nvcc", "-O3", "-std=c++17", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC"]
    library = folder / "rates.so"
    subprocess.run([*command, "-o", str(library), str(folder / "rates.cu")], check=True)
    return library


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        library = compile_library(Path(name), "sm_90" if options.compile_only else "native")
        if options.compile_only:
            from sass_report import call, find_tool

            code = call(find_tool("cuobjdump"), "-sass", library, "sm_90")
            found = sorted(set(re.findall(r"REDG?\.E\.[\w.]+", code)))
            if len(found) != 4:
                sys.exit(f"expected four kinds of RED, got {found}")
            print("compiled:", ", ".join(found))
            return
        measure = ctypes.CDLL(str(library)).measure
        measure.restype = ctypes.c_float
        rows = []
        for place, count in PLACES.items():
            for kind, (what, size) in enumerate(KINDS):
                ms = measure(kind, count, BLOCKS)
                if ms <= 0:
                    sys.exit(f"{what}, {place}: failed")
                rate = BLOCKS * THREADS * STEPS * size / (ms * 1e9)
                print(f"{what}, {place}: {rate:.2f} TB/s ({ms:.3g} ms)", flush=True)
                rows.append({"what": what, "place": place, "tb_per_s": rate, "ms": ms})
                if options.save:
                    options.save.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
