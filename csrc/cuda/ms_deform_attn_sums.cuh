// How gradients of values are summed on the GPU, where many samples meet in one cell: by atomics of
// floating point, four float32 at a time where the GPU can; or, where deterministic algorithms are
// asked for, of 64-bit integers, whose sum is the same in any order.
#pragma once

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <cmath>
#include <cstdint>

namespace dn_detr {

// Sums in floating point.
template <typename T>
struct FloatingSum {
  using Number = T;
  T* sums;

  // Adds weight * grad, unless the weight is zero.
  template <int VECTOR>
  __device__ __forceinline__ void add(T* to, T weight, const T (&grad)[VECTOR]) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (sizeof(T) == 4 && VECTOR % 4 == 0) {
#pragma unroll
      for (int k = 0; k < VECTOR; k += 4) {
        // No "memory" clobber: nothing in the kernel reads the sums, and loads may move past.
        asm volatile(
            "{.reg .pred p; setp.neu.f32 p, %5, 0f00000000;\n\t"
            "@p red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};}" ::"l"(
                __cvta_generic_to_global(to + k)),
            "f"(weight * grad[k]), "f"(weight * grad[k + 1]), "f"(weight * grad[k + 2]),
            "f"(weight * grad[k + 3]), "f"(weight));
      }
    } else
#endif
    {
      if (weight != T(0)) {
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) {
          atomicAdd(to + k, weight * grad[k]);
        }
      }
    }
  }
};

// Sums in units of 1 / scale, see `scale_of`.
template <typename T>
struct FixedPointSum {
  using Number = int64_t;
  int64_t* sums;
  const T* scale;

  template <int VECTOR>
  __device__ __forceinline__ void add(int64_t* to, T weight, const T (&grad)[VECTOR]) const {
    if (weight == T(0)) {
      return;
    }
    const T factor = __ldg(scale);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      // Scaled last: grad may be too small, weight times scale too large for T.
      const T scaled = weight * grad[k] * factor;
      long long units;
      if constexpr (sizeof(T) == 4) {
        units = __float2ll_rn(scaled);
      } else {
        units = __double2ll_rn(scaled);
      }
      atomicAdd(
          reinterpret_cast<unsigned long long*>(to + k), static_cast<unsigned long long>(units));
    }
  }
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

} // namespace dn_detr
