// Backward pass of ms_deform_attn on the GPU.

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "ms_deform_attn.cuh"
#include "ms_deform_attn_gradients.cuh"

namespace dn_detr {
namespace {

template <typename S, typename T, int VECTOR, int LANES, typename Sum>
__global__ void __launch_bounds__(THREADS) backward_kernel(
    const Geometry g,
    const S* __restrict__ grad_output,
    const S* __restrict__ value,
    const T* __restrict__ locations,
    const T* __restrict__ weights,
    Sum grad_value,
    T* __restrict__ grad_locations,
    T* __restrict__ grad_weights) {
  grad_value.begin();
  // With fewer than 32 lanes, each lane has one vector, which stays in registers.
  constexpr bool is_single = LANES < 32;
  const int32_t group = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
  if (group >= g.queries * g.heads) {
    return; // the whole group; the others shuffle only within their group
  }
  const int32_t head = group % g.heads, stride = g.stride();
  const int32_t samples = g.levels * g.points;
  const int32_t lane = threadIdx.x % LANES, first = lane * VECTOR;
  constexpr int UNIT = Sum::unit(VECTOR);
  const int32_t step = g.channels / VECTOR * UNIT; // see ms_deform_attn_gradients.cuh
  const unsigned mask = (LANES == 32 ? 0xffffffffu : ((1u << LANES % 32) - 1))
      << (threadIdx.x % 32 / LANES * LANES);
  for (int32_t image = blockIdx.y; image < g.batch; image += gridDim.y) {
    const int64_t row = static_cast<int64_t>(image) * g.queries * g.heads + group;
    const int64_t base = static_cast<int64_t>(image) * g.tokens * stride + head * g.channels;
    const S* grads = grad_output + row * g.channels;
    Pack<S, VECTOR> pack;
    T grad[VECTOR];
    pack.clear();
    if (is_single && first < g.channels) {
      pack.load(grads + first);
    }
    unpack(pack, grad);
    int64_t sample = row * samples;
    for (int32_t l = 0; l < g.levels; ++l) {
      const Level level = g.level[l];
#pragma unroll 1
      for (int32_t p = 0; p < g.points; ++p, ++sample) {
        const SamplePosition<T> position(level, load_pair(locations + 2 * sample));
        const T weight = __ldg(weights + sample);
        T dot[4] = {}; // of grad_output and each corner, over this lane's channels
        for (int32_t c = first; c < g.channels; c += LANES * VECTOR) {
          if (!is_single) {
            pack.load(grads + c);
            unpack(pack, grad);
          }
          Pack<S, VECTOR> corner[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            corner[i].clear();
            if (position.has[i]) {
              corner[i].load(value + base + position.offset(i, level, stride) + c);
            }
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const T corner_weight = position.has[i] ? weight * position.bilinear(i) : T(0);
            grad_value.add(
                grad_value.sums + base + position.offset(i, level, stride) + c / VECTOR * UNIT,
                step, corner_weight, grad);
            T element[VECTOR];
            unpack(corner[i], element);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) {
              dot[i] += grad[k] * element[k];
            }
          }
          if (is_single) {
            break;
          }
        }
        const T upper = dot[0] + position.x * (dot[1] - dot[0]);
        const T lower = dot[2] + position.x * (dot[3] - dot[2]);
        const T along_x = (dot[1] - dot[0]) * (1 - position.y) + (dot[3] - dot[2]) * position.y;
        const T along_y = sum_over_lanes<LANES>(lower - upper, mask);
        const T sampled = sum_over_lanes<LANES>(upper + position.y * (lower - upper), mask);
        const T sum_along_x = sum_over_lanes<LANES>(along_x, mask);
        if (lane == 0) {
          // Samples outside get no gradient, even if their weight is NaN.
          grad_weights[sample] = sampled;
          const bool is_inside = position.is_inside;
          grad_locations[2 * sample] = is_inside ? weight * sum_along_x * level.width : T(0);
          grad_locations[2 * sample + 1] = is_inside ? weight * along_y * level.height : T(0);
        }
      }
    }
  }
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
  if (grad_output_.numel() == 0 || weights_.numel() == 0) {
    return {at::zeros(value_.sizes(), value_.options()), at::zeros(locations_.sizes(), options),
            at::zeros(weights_.sizes(), options)};
  }
  if (must_be_widened(value_)) {
    auto [grad_value, grad_locations, grad_weights] = ms_deform_attn_backward(
        grad_output_.to(at::kFloat), value_.to(at::kFloat), spatial_shapes, locations_, weights_);
    return {grad_value.to(value_.scalar_type()), grad_locations, grad_weights};
  }
  auto sums = empty_aligned(value_.sizes(), is_fixed ? options.dtype(at::kLong) : options).zero_();
  auto grad_locations = empty_aligned(locations_.sizes(), options);
  auto grad_weights = empty_aligned(weights_.sizes(), options);
  at::Tensor grad_value;
  const Geometry g = geometry_of(sizes);
  const auto grad_output = aligned(grad_output_), value = aligned(value_);
  const auto locations = aligned(locations_), weights = aligned(weights_);
  at::Tensor scale;
  if (is_fixed) {
    const auto largest =
        grad_output.abs().amax().to(at::kDouble) * weights.abs().amax().to(at::kDouble);
    scale = scale_of(largest, sizes.queries * sizes.points, weights.scalar_type());
  }
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
          grad_value = finish<scalar_t, T, vector.value>(sum, sums, g, value.scalar_type());
        };
        choose_tiling<scalar_t>(g.channels, [&](auto vector, auto lanes) {
          if (is_fixed) {
            launch(vector, lanes, FixedPointSum<T>{sums.mutable_data_ptr<int64_t>(),
                                                   scale.const_data_ptr<T>(), {}});
          } else {
            launch(vector, lanes, FloatingSum<T>{sums.mutable_data_ptr<T>()});
          }
        });
      });
  return {grad_value, grad_locations, grad_weights};
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CUDA, m) {
  m.impl("ms_deform_attn_backward", ms_deform_attn_backward);
}

} // namespace dn_detr
