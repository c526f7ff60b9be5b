// Deformable attention on the GPU, backward. grad_value is summed by atomics: of float32, four at a
// time where the GPU can; or, where deterministic algorithms are asked for, of 64-bit integers,
// whose sum is the same in any order.

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "ms_deform_attn.cuh"

namespace dn_detr {
namespace {

// Sums in floating point.
template <typename T>
struct FloatingSum {
  using Number = T;
  T* sums;

  template <typename S, int VECTOR>
  __device__ __forceinline__ void add(int64_t at, T weight, const Pack<S, VECTOR>& grad) const {
    T* to = sums + at;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (sizeof(T) == 4 && VECTOR % 4 == 0) {
#pragma unroll
      for (int k = 0; k < VECTOR; k += 4) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = weight * static_cast<float>(grad.number[k + i]);
        }
        // No "memory" clobber: nothing in the kernel reads the sums, and loads may move past.
        asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                         __cvta_generic_to_global(to + k)),
                     "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
      }
    } else
#endif
    {
#pragma unroll
      for (int k = 0; k < VECTOR; ++k) {
        atomicAdd(to + k, weight * static_cast<T>(grad.number[k]));
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

  template <typename S, int VECTOR>
  __device__ __forceinline__ void add(int64_t at, T weight, const Pack<S, VECTOR>& grad) const {
    const T factor = __ldg(scale);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      // Scaled last: grad may be too small, weight times scale too large for T.
      const T scaled = weight * static_cast<T>(grad.number[k]) * factor;
      long long units;
      if constexpr (sizeof(T) == 4) {
        units = __float2ll_rn(scaled);
      } else {
        units = __double2ll_rn(scaled);
      }
      atomicAdd(
          reinterpret_cast<unsigned long long*>(sums + at + k),
          static_cast<unsigned long long>(units));
    }
  }
};

// Sum over the lanes of a group, on all of them.
template <int LANES, typename T>
__device__ __forceinline__ T sum_lanes(T x, unsigned mask) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(mask, x, distance);
  }
  return x;
}

template <typename S, typename T, int VECTOR, int LANES, typename Sum>
__global__ void __launch_bounds__(THREADS) backward_kernel(
    const Geometry g,
    const S* __restrict__ grad_output,
    const S* __restrict__ value,
    const T* __restrict__ locations,
    const T* __restrict__ weights,
    const Sum grad_value,
    T* __restrict__ grad_locations,
    T* __restrict__ grad_weights) {
  // With fewer than 32 lanes one vector per lane is all there is, and stays in registers.
  constexpr bool is_single = LANES < 32;
  const int32_t group = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
  if (group >= g.queries * g.heads) {
    return; // a whole group: the others shuffle among themselves
  }
  const int32_t head = group % g.heads, stride = g.stride();
  const int32_t samples = g.levels * g.points;
  const int32_t lane = threadIdx.x % LANES, first = lane * VECTOR;
  const unsigned mask = (LANES == 32 ? 0xffffffffu : ((1u << LANES % 32) - 1))
      << (threadIdx.x % 32 / LANES * LANES);
  for (int32_t image = blockIdx.y; image < g.batch; image += gridDim.y) {
    const int64_t row = static_cast<int64_t>(image) * g.queries * g.heads + group;
    const int64_t base = static_cast<int64_t>(image) * g.tokens * stride + head * g.channels;
    const S* grads = grad_output + row * g.channels;
    Pack<S, VECTOR> grad;
    grad.clear();
    if (is_single && first < g.channels) {
      grad.load(grads + first);
    }
    int64_t sample = row * samples;
    for (int32_t l = 0; l < g.levels; ++l) {
      const Level level = g.level[l];
#pragma unroll 1
      for (int32_t p = 0; p < g.points; ++p, ++sample) {
        const Place<T> place(level, load_pair(locations + 2 * sample), stride);
        const T weight = __ldg(weights + sample);
        T dot[4] = {}; // of grad_output with each corner, this lane's channels
        for (int32_t c = first; c < g.channels; c += LANES * VECTOR) {
          if (!is_single) {
            grad.load(grads + c);
          }
          Pack<S, VECTOR> corner[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            corner[i].clear();
            if (place.has[i]) {
              corner[i].load(value + base + place.corner(i) + c);
            }
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (place.has[i]) {
              grad_value.add(base + place.corner(i) + c, weight * place.weight(i), grad);
            }
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) {
              dot[i] += static_cast<T>(grad.number[k]) * static_cast<T>(corner[i].number[k]);
            }
          }
          if (is_single) {
            break;
          }
        }
        const T upper = dot[0] + place.x * (dot[1] - dot[0]);
        const T lower = dot[2] + place.x * (dot[3] - dot[2]);
        const T along_x = (dot[1] - dot[0]) * (1 - place.y) + (dot[3] - dot[2]) * place.y;
        const T along_y = sum_lanes<LANES>(lower - upper, mask);
        const T sampled = sum_lanes<LANES>(upper + place.y * (lower - upper), mask);
        const T sum_along_x = sum_lanes<LANES>(along_x, mask);
        if (lane == 0) {
          // A sample outside gets no gradient, even if its weight is NaN.
          grad_weights[sample] = sampled;
          grad_locations[2 * sample] = place.is_inside ? weight * sum_along_x * level.width : T(0);
          grad_locations[2 * sample + 1] = place.is_inside ? weight * along_y * level.height : T(0);
        }
      }
    }
  }
}

// How many units one is in fixed point, a tensor on the device: nothing waits for it. No cell gets
// more than Q * P contributions, none larger than the largest weight times the largest gradient, so
// that all of them together stay below 2^62; 2^45 units are left for the largest one where a
// hundred thousand queries and points meet. If there is an infinity or NaN, scale is 0, and the
// result, divided by it, NaN: loud, as it would be in floating point.
at::Tensor scale_of(const at::Tensor& grad, const at::Tensor& weights, const Sizes& sizes) {
  const auto dtype = weights.scalar_type();
  const auto largest = grad.abs().amax().to(at::kDouble) * weights.abs().amax().to(at::kDouble);
  const double count = static_cast<double>(sizes.queries * sizes.points);
  const double most = dtype == at::kDouble ? 1000 : 120; // of the exponent
  const auto exponent = (62 - std::ceil(std::log2(count)) - largest.log2().ceil()).clamp_max(most);
  return at::where(largest.isfinite(), exponent.exp2(), 0.0).to(dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(
    const at::Tensor& grad_output_,
    const at::Tensor& value_,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& locations_,
    const at::Tensor& weights_) {
  const Sizes sizes = check_ms_deform_attn(value_, spatial_shapes, locations_, weights_);
  check_grad_output(grad_output_, value_, sizes);
  const c10::cuda::CUDAGuard guard(value_.device());
  const bool is_fixed = at::globalContext().deterministicAlgorithms();
  const auto options = locations_.options();
  auto sums = at::zeros(value_.sizes(), is_fixed ? options.dtype(at::kLong) : options);
  auto grad_locations = at::empty(locations_.sizes(), options);
  auto grad_weights = at::empty(weights_.sizes(), options);
  if (grad_output_.numel() == 0 || weights_.numel() == 0) {
    return {sums.to(value_.scalar_type()), grad_locations.zero_(), grad_weights.zero_()};
  }
  const Geometry g = geometry_of(sizes);
  const auto grad_output = aligned(grad_output_), value = aligned(value_);
  const auto locations = aligned(locations_), weights = aligned(weights_);
  const auto scale = is_fixed ? scale_of(grad_output, weights, sizes) : at::Tensor();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_backward", [&] {
        using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
        const auto launch = [&](auto vector, auto lanes, auto sum) {
          backward_kernel<scalar_t, T, vector.value, lanes.value>
              <<<grid_of(g, lanes.value), THREADS, 0, stream>>>(
                  g, grad_output.const_data_ptr<scalar_t>(), value.const_data_ptr<scalar_t>(),
                  locations.const_data_ptr<T>(), weights.const_data_ptr<T>(), sum,
                  grad_locations.mutable_data_ptr<T>(), grad_weights.mutable_data_ptr<T>());
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        };
        choose_tiling<scalar_t>(g.channels, [&](auto vector, auto lanes) {
          if (is_fixed) {
            launch(vector, lanes, FixedPointSum<T>{sums.mutable_data_ptr<int64_t>(),
                                                   scale.const_data_ptr<T>()});
          } else {
            launch(vector, lanes, FloatingSum<T>{sums.mutable_data_ptr<T>()});
          }
        });
      });
  const auto grad_value = is_fixed ? sums.to(options.dtype()) / scale : sums;
  return {grad_value.to(value_.scalar_type()), grad_locations, grad_weights};
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CUDA, m) {
  m.impl("ms_deform_attn_backward", ms_deform_attn_backward);
}

} // namespace dn_detr
