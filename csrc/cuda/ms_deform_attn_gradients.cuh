// How gradients of values are summed on the GPU, where many samples meet in one cell: by atomics of
// floating point, four float32 at a time where the GPU can; or, where deterministic algorithms are
// asked for, of 64-bit integers, whose sum is the same in any order.
//
// A lane has VECTOR neighbouring channels of a cell and head, and adds `unit(VECTOR)` of them with one
// instruction. That all lanes together then add to whole sectors of memory, the sums of a row stand
// in another order than its channels: the first unit of every lane, the second of every lane, and so
// on. `finish` puts them in order.
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

// Adds x to what lies in global memory, if it is to be used. Of a pointer that a kernel worked out
// itself the compiler knows not that it is global: its own atomics would wait for an answer, and ask
// for shared memory. No "memory" clobber: nothing in the kernels reads the sums, loads may move past.
template <typename T>
__device__ __forceinline__ void add_if(bool is_used, T* to, T x) {
#if defined(__CUDA_ARCH__)
  const auto place = __cvta_generic_to_global(to);
  const int used = is_used;
  if constexpr (std::is_same_v<T, float>) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0;\n\t"
                 "@p red.relaxed.gpu.global.add.f32 [%0], %1;}" ::"l"(place), "f"(x), "r"(used));
  } else if constexpr (std::is_same_v<T, double>) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0;\n\t"
                 "@p red.relaxed.gpu.global.add.f64 [%0], %1;}" ::"l"(place), "d"(x), "r"(used));
  } else {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0;\n\t"
                 "@p red.relaxed.gpu.global.add.u64 [%0], %1;}" ::"l"(place), "l"(x), "r"(used));
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
  using Number = T;
  T* sums;

  static constexpr int unit(int vector) { return sizeof(T) == 4 && vector % 4 == 0 ? 4 : 1; }

  __device__ __forceinline__ void begin() {}

  // Adds weight * grad, unless the weight is zero. step: from one unit to the next.
  template <int VECTOR>
  __device__ __forceinline__ void add(T* to, int32_t step, T weight, const T (&grad)[VECTOR]) const {
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

// Sums in units of 1 / scale, see `scale_of`.
template <typename T>
struct FixedPointSum {
  using Number = int64_t;
  int64_t* sums;
  const T* scale;
  T factor; // the scale, once it is read

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
      // Scaled last: grad may be too small, weight times scale too large for T.
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

// How many units one is in fixed point, a tensor on the device: nothing waits for it. If no cell
// gets more than `count` contributions, none larger than `largest`, then all of them together stay
// below 2^62; 2^45 units are left for the largest one where a hundred thousand meet. If there is an
// infinity or NaN, scale is 0, and the result, divided by it, NaN: loud, as in floating point.
inline at::Tensor scale_of(const at::Tensor& largest, int64_t count, at::ScalarType dtype) {
  const double most = dtype == at::kDouble ? 1000 : 120; // of the exponent
  const double spare = 62 - std::ceil(std::log2(static_cast<double>(count)));
  const auto exponent = (spare - largest.to(at::kDouble).log2().ceil()).clamp_max(most);
  return at::where(largest.isfinite(), exponent.exp2(), 0.0).to(dtype);
}

// Room that will be written in full. PyTorch's own `empty` fills it where deterministic algorithms
// are asked for, which takes as long as all the rest in a decoder.
inline at::Tensor room_for(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::Tensor(at::detail::empty_cuda(sizes, options));
}

// blockIdx.y: image. A thread does a vector of channels; each cell and head has `row` of them.
template <typename S, typename T, int VECTOR, typename Sum>
__global__ void __launch_bounds__(THREADS) finish_kernel(
    const Sum sum,
    int32_t batch,
    uint32_t vectors, // of an image
    uint32_t row,
    S* __restrict__ result) {
  using Number = typename Sum::Number;
  constexpr int UNIT = Sum::unit(VECTOR);
  const uint32_t i = blockIdx.x * THREADS + threadIdx.x, place = i % row;
  if (i >= vectors) {
    return;
  }
  for (int32_t image = blockIdx.y; image < batch; image += gridDim.y) {
    const int64_t first = static_cast<int64_t>(image) * vectors;
    const Number* from = sum.sums + (first + (i - place)) * VECTOR + place * UNIT;
    Pack<S, VECTOR> pack;
#pragma unroll
    for (int k = 0; k < VECTOR; k += UNIT) {
      Pack<Number, UNIT> unit;
      unit.load(from + static_cast<int64_t>(k) * row);
#pragma unroll
      for (int j = 0; j < UNIT; ++j) {
        pack.number[k + j] = static_cast<S>(sum.finished(unit.number[j]));
      }
    }
    pack.store(result + (first + i) * VECTOR);
  }
}

// The gradient of the values [B, S, H, D], of type S, from their sums.
template <typename S, typename T, int VECTOR, typename Sum>
at::Tensor finish(const Sum& sum, const at::Tensor& sums, const Geometry& g, at::ScalarType dtype) {
  if constexpr (std::is_same_v<S, typename Sum::Number>) {
    return sums; // one unit is a whole vector
  } else {
    auto result = room_for(sums.sizes(), sums.options().dtype(dtype));
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
