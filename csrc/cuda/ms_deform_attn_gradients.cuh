// Accumulation of the gradient of the values on the GPU, where many samples meet in one cell:
// atomics in floating point, four float32 at a time from sm_90 on; or, with deterministic
// algorithms, atomics on 64-bit integers, whose sum does not depend on the order.
//
// A lane has VECTOR neighbouring channels of a cell and head, and adds `unit(VECTOR)` of them with
// one instruction. So that a group of lanes adds to whole sectors of memory, the sums of a row are
// interleaved: the first unit of every lane, the second of every lane, and so on. `finish` restores
// the order of channels.
#pragma once

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>
#include <cstdint>

#include "ms_deform_attn.cuh"

namespace dn_detr {

// Adds x to global memory if is_used. The compiler cannot tell that a computed pointer is global:
// its own atomics would be generic, with a return value and a check for shared memory. No "memory"
// clobber: kernels never read the sums, so loads may be reordered.
template <typename T>
__device__ __forceinline__ void add_if(bool is_used, T* to, T x) {
#if defined(__CUDA_ARCH__)
  const auto address = __cvta_generic_to_global(to);
  const int used = is_used;
  if constexpr (std::is_same_v<T, float>) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0;\n\t"
                 "@p red.relaxed.gpu.global.add.f32 [%0], %1;}" ::"l"(address), "f"(x), "r"(used));
  } else if constexpr (std::is_same_v<T, double>) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0;\n\t"
                 "@p red.relaxed.gpu.global.add.f64 [%0], %1;}" ::"l"(address), "d"(x), "r"(used));
  } else {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0;\n\t"
                 "@p red.relaxed.gpu.global.add.u64 [%0], %1;}" ::"l"(address), "l"(x), "r"(used));
  }
#else
  if (is_used) {
    *to += x;
  }
#endif
}

// Sums in floating point.
template <typename T>
struct FloatingSum {
  using Accumulator = T;
  T* sums;

  static constexpr int unit(int vector) { return sizeof(T) == 4 && vector % 4 == 0 ? 4 : 1; }

  __device__ __forceinline__ void begin() {}

  // Adds weight * grad unless the weight is zero. step: distance between units.
  template <int VECTOR>
  __device__ __forceinline__ void add(
      T* to,
      int32_t step,
      T weight,
      const T (&grad)[VECTOR]) const {
    constexpr int UNIT = unit(VECTOR);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (UNIT == 4) {
#pragma unroll
      for (int k = 0; k < VECTOR; k += 4) {
        asm volatile(
            "{.reg .pred p; setp.neu.f32 p, %5, 0f00000000;\n\t"
            "@p red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};}" ::"l"(
                __cvta_generic_to_global(to + k / 4 * step)),
            "f"(weight * grad[k]), "f"(weight * grad[k + 1]), "f"(weight * grad[k + 2]),
            "f"(weight * grad[k + 3]), "f"(weight));
      }
    } else
#endif
    {
#pragma unroll
      for (int k = 0; k < VECTOR; ++k) {
        add_if(weight != T(0), to + k / UNIT * step + k % UNIT, weight * grad[k]);
      }
    }
  }

  __device__ __forceinline__ T finished(T sum) const { return sum; }
};

// Sums in fixed point, in units of 1 / scale; see `scale_of`.
template <typename T>
struct FixedPointSum {
  using Accumulator = int64_t;
  int64_t* sums;
  const T* scale;
  T factor; // *scale, loaded by begin()

  static constexpr int unit(int) { return 1; }

  __device__ __forceinline__ void begin() { factor = __ldg(scale); }

  template <int VECTOR>
  __device__ __forceinline__ void add(
      int64_t* to,
      int32_t step,
      T weight,
      const T (&grad)[VECTOR]) const {
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      // Multiply by the scale last: weight * scale could overflow T.
      const T scaled = weight * grad[k] * factor;
      int64_t units;
      if constexpr (sizeof(T) == 4) {
        units = __float2ll_rn(scaled);
      } else {
        units = __double2ll_rn(scaled);
      }
      add_if(weight != T(0), to + k * step, units);
    }
  }

  __device__ __forceinline__ T finished(int64_t sum) const { return static_cast<T>(sum) / *scale; }
};

// The scale of fixed point, a tensor on the device, so that the host does not wait for it. With at
// most `count` contributions to a cell, none larger than `largest`, sums stay below 2^62; with
// 100,000 contributions the largest one still has 2^45 units. If a value is infinite or NaN, the
// scale is 0, and the result, divided by it, NaN as in floating point.
inline at::Tensor scale_of(const at::Tensor& largest, int64_t count, at::ScalarType dtype) {
  const double most = dtype == at::kDouble ? 1000 : 120; // of the exponent
  const double spare = 62 - std::ceil(std::log2(static_cast<double>(count)));
  const auto exponent = (spare - largest.to(at::kDouble).log2().ceil()).clamp_max(most);
  return at::where(largest.isfinite(), exponent.exp2(), 0.0).to(dtype);
}

// Uninitialized memory that will be written in full. at::empty fills it if deterministic algorithms
// are on, which takes as long as all other work of a decoder.
inline at::Tensor empty_aligned(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::Tensor(at::detail::empty_cuda(sizes, options));
}

// blockIdx.y: image. A thread handles a vector of channels; each cell and head has `row` vectors.
template <typename S, typename T, int VECTOR, typename Sum>
__global__ void __launch_bounds__(THREADS) finish_kernel(
    const Sum sum,
    int32_t batch,
    uint32_t vectors, // of an image
    uint32_t row,
    S* __restrict__ result) {
  using Accumulator = typename Sum::Accumulator;
  constexpr int UNIT = Sum::unit(VECTOR);
  const uint32_t i = blockIdx.x * THREADS + threadIdx.x, column = i % row;
  if (i >= vectors) {
    return;
  }
  for (int32_t image = blockIdx.y; image < batch; image += gridDim.y) {
    const int64_t first = static_cast<int64_t>(image) * vectors;
    const Accumulator* from = sum.sums + (first + (i - column)) * VECTOR + column * UNIT;
    Pack<S, VECTOR> pack;
#pragma unroll
    for (int k = 0; k < VECTOR; k += UNIT) {
      Pack<Accumulator, UNIT> unit;
      unit.load(from + static_cast<int64_t>(k) * row);
#pragma unroll
      for (int j = 0; j < UNIT; ++j) {
        pack.element[k + j] = static_cast<S>(sum.finished(unit.element[j]));
      }
    }
    pack.store(result + (first + i) * VECTOR);
  }
}

// The gradient of the values [B, S, H, D], of type S, from their sums.
template <typename S, typename T, int VECTOR, typename Sum>
at::Tensor finish(const Sum& sum, const at::Tensor& sums, const Geometry& g, at::ScalarType dtype) {
  if constexpr (std::is_same_v<S, typename Sum::Accumulator>) {
    return sums; // a unit is a whole vector: nothing is interleaved
  } else {
    auto result = empty_aligned(sums.sizes(), sums.options().dtype(dtype));
    const auto vectors = static_cast<uint32_t>(sums.numel() / g.batch / VECTOR);
    if (vectors > 0) {
      const dim3 grid((vectors - 1) / THREADS + 1, std::min(g.batch, 65535));
      finish_kernel<S, T, VECTOR>
          <<<grid, THREADS, 0, c10::cuda::getCurrentCUDAStream()>>>(
              sum, g.batch, vectors, static_cast<uint32_t>(g.channels / VECTOR),
              result.template mutable_data_ptr<S>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    return result;
  }
}

} // namespace dn_detr
