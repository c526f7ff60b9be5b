// Forward pass of ms_deform_attn on the GPU.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ms_deform_attn.cuh"

namespace dn_detr {
namespace {

template <typename S, typename T, int VECTOR, int LANES>
__global__ void __launch_bounds__(THREADS) forward_kernel(
    const Geometry g,
    const S* __restrict__ value,
    const T* __restrict__ locations,
    const T* __restrict__ weights,
    S* __restrict__ output) {
  const int32_t group = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
  if (group >= g.queries * g.heads) {
    return;
  }
  const int32_t head = group % g.heads, stride = g.stride();
  const int32_t samples = g.levels * g.points;
  for (int32_t image = blockIdx.y; image < g.batch; image += gridDim.y) {
    const int64_t row = static_cast<int64_t>(image) * g.queries * g.heads + group;
    const S* values = value + static_cast<int64_t>(image) * g.tokens * stride + head * g.channels;
    for (int32_t c = threadIdx.x % LANES * VECTOR; c < g.channels; c += LANES * VECTOR) {
      const T* location = locations + row * samples * 2;
      const T* attention = weights + row * samples;
      T sum[VECTOR] = {};
      for (int32_t l = 0; l < g.levels; ++l) {
        const Level level = g.level[l];
#pragma unroll 2
        for (int32_t p = 0; p < g.points; ++p, location += 2, ++attention) {
          const SamplePosition<T> position(level, load_pair(location));
          // Samples outside add nothing, even if their weight is NaN.
          const T weight = position.is_inside ? __ldg(attention) : T(0);
          Pack<S, VECTOR> corner[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            corner[i].clear();
            if (position.has[i]) {
              corner[i].load(values + position.offset(i, level, stride) + c);
            }
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const T corner_weight = weight * position.bilinear(i);
            T element[VECTOR];
            unpack(corner[i], element);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) {
              sum[k] += corner_weight * element[k];
            }
          }
        }
      }
      Pack<S, VECTOR> result;
#pragma unroll
      for (int k = 0; k < VECTOR; ++k) {
        result.element[k] = static_cast<S>(sum[k]);
      }
      result.store(output + row * g.channels + c);
    }
  }
}

at::Tensor ms_deform_attn(
    const at::Tensor& value_,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& locations_,
    const at::Tensor& weights_) {
  const Sizes sizes = check_ms_deform_attn(value_, spatial_shapes, locations_, weights_);
  const c10::cuda::CUDAGuard guard(value_.device());
  auto output =
      at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, value_.options());
  if (output.numel() == 0) {
    return output;
  }
  if (must_be_widened(value_)) {
    return ms_deform_attn(value_.to(at::kFloat), spatial_shapes, locations_, weights_)
        .to(value_.scalar_type());
  }
  const Geometry g = geometry_of(sizes);
  const auto value = aligned(value_), locations = aligned(locations_), weights = aligned(weights_);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn", [&] {
        using T = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
        choose_tiling<scalar_t>(g.channels, [&](auto vector, auto lanes) {
          forward_kernel<scalar_t, T, vector.value, lanes.value>
              <<<grid_of(g, lanes.value), THREADS, 0, stream>>>(
                  g, value.const_data_ptr<scalar_t>(), locations.const_data_ptr<T>(),
                  weights.const_data_ptr<T>(), output.mutable_data_ptr<scalar_t>());
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        });
      });
  return output;
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CUDA, m) {
  m.impl("ms_deform_attn", ms_deform_attn);
}

} // namespace dn_detr
