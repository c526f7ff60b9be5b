// What forward and backward of the fused deformable attention share on the GPU.
//
// A group of LANES neighbouring lanes does one (image, query, head). Each lane works out where one
// sample lies and what its corners count, LANES samples at a time; then the group walks over these
// samples, told to all its lanes by shuffles, and each lane reads its channels of the corners, 16
// bytes of them. So nothing is done by several lanes but addresses.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../deformable_attention.h"
#include "deformable_attention_tiles.cuh"
#include "ms_deform_attn.cuh"

namespace dn_detr {

// S: type of the values, O: of offsets and logits, T: what is computed with.
template <typename S, typename O, typename T>
struct Problem {
  Geometry g;
  Order order;
  int32_t first_image; // of this launch
  int32_t samples; // levels * points, of a query and head
  uint32_t inverse_points; // 2^31 / points, rounded up
  int32_t coordinates, reference_levels;
  int32_t size_of_value, size_of_sum; // bytes, see `advance`
  T half_by_points; // 0.5 / points
  const S* value; // [B, S, H, D]
  const T* valid_sizes; // [B, levels, 2]
  const T* reference; // [B, Q, reference_levels, coordinates]
  const O* offsets; // [B, Q, H, levels, P, 2]
  const O* logits; // [B, Q, H, levels * P]
  const bool* padding; // [B, S] or null
};

// The inputs, contiguous and aligned; the problem points into them.
struct DeformableInputs {
  at::Tensor value, valid_sizes, reference, offsets, logits, padding;

  template <typename S, typename O, typename T>
  Problem<S, O, T> problem(const DeformableSizes& sizes) const {
    TORCH_CHECK_VALUE(
        sizes.samples() * sizes.points < std::numeric_limits<int32_t>::max(),
        "expected levels * P * P below 2^31, got P = ", sizes.points);
    Problem<S, O, T> problem{};
    problem.g = geometry_of(sizes);
    problem.samples = static_cast<int32_t>(sizes.samples());
    problem.inverse_points = static_cast<uint32_t>(((int64_t{1} << 31) - 1) / sizes.points + 1);
    problem.coordinates = static_cast<int32_t>(sizes.coordinates);
    problem.reference_levels = static_cast<int32_t>(sizes.reference_levels);
    problem.size_of_value = sizeof(S);
    problem.half_by_points = static_cast<T>(0.5 / static_cast<double>(sizes.points));
    problem.value = value.const_data_ptr<S>();
    problem.valid_sizes = valid_sizes.const_data_ptr<T>();
    problem.reference = reference.const_data_ptr<T>();
    problem.offsets = offsets.const_data_ptr<O>();
    problem.logits = logits.const_data_ptr<O>();
    problem.padding = padding.defined() ? padding.const_data_ptr<bool>() : nullptr;
    return problem;
  }
};

// Calls launch(S(), O(), T()) for the types of the tensors.
template <typename F>
void choose_types(const at::Tensor& value, const at::Tensor& offsets, const F& launch) {
  const bool is_same = value.scalar_type() == offsets.scalar_type();
  switch (value.scalar_type()) {
    case at::kHalf:
      return is_same ? launch(c10::Half(), c10::Half(), 0.f) : launch(c10::Half(), 0.f, 0.f);
    case at::kBFloat16:
      return is_same ? launch(c10::BFloat16(), c10::BFloat16(), 0.f)
                     : launch(c10::BFloat16(), 0.f, 0.f);
    case at::kDouble:
      return launch(0., 0., 0.);
    default:
      return launch(0.f, 0.f, 0.f);
  }
}

// A grid has at most 65535 blocks in z, which are images.
template <typename Kernel, typename P, typename... Outputs>
void launch_on_images(Kernel kernel, P problem, Outputs... outputs) {
  for (int32_t first = 0; first < problem.g.batch; first += 65535) {
    dim3 grid = problem.order.grid(problem.g);
    grid.z = std::min(problem.g.batch - first, 65535);
    problem.first_image = first;
    kernel<<<grid, problem.order.threads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        problem, outputs...);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

// ------------------------------------------------------------------------------------ lanes

constexpr unsigned ALL_LANES = 0xffffffffu;

template <int LANES, typename T>
__device__ __forceinline__ T tell(T x, int from) {
  return __shfl_sync(ALL_LANES, x, from, LANES);
}

template <int LANES, typename T>
__device__ __forceinline__ T sum_of_lanes(T x) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(ALL_LANES, x, distance);
  }
  return x;
}

// The compiler is not to work out a pointer anew in every round of a loop.
template <typename T>
__device__ __forceinline__ void keep(T*& pointer) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(pointer));
#endif
}

// `from + by`, as one instruction. The size of T is a number of the launch so that it stays one.
template <typename T>
__device__ __forceinline__ T* advance(T* from, int32_t by, int32_t size) {
#if defined(__CUDA_ARCH__)
  T* to;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(to) : "r"(by), "r"(size), "l"(from));
  return to;
#else
  return from + by;
#endif
}

// ---------------------------------------------------------------------------------- softmax

__device__ __forceinline__ float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); // off by 2^-22 at most
  return y;
#else
  return std::exp2(x);
#endif
}

__device__ __forceinline__ double power_of_two(double x) {
  return exp2(x);
}

// e^(logit - largest) = 2^((logit - largest) / log(2))
template <typename T>
__device__ __forceinline__ T power_of(T logit, T largest) {
  return power_of_two((logit - largest) * T(1.4426950408889634));
}

// The largest logit of a query and head. NaN is passed over: it comes to light in the sum.
template <int LANES, typename T, typename O>
__device__ __forceinline__ T largest_logit(const O* logits, int32_t samples, int32_t lane) {
  T largest = -std::numeric_limits<T>::infinity();
#pragma unroll 1
  for (int32_t first = 0; first < samples; first += 4 * LANES) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t s = min(first + i * LANES + lane, samples - 1);
      largest = max(largest, static_cast<T>(logits[s]));
    }
  }
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, distance));
  }
  return largest;
}

// By which the powers of the logits are divided to give the weights.
template <int LANES, typename T, typename O>
__device__ __forceinline__ T sum_of_powers(
    const O* logits,
    int32_t samples,
    int32_t lane,
    T largest) {
  T sum = 0;
#pragma unroll 1
  for (int32_t first = 0; first < samples; first += 4 * LANES) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t s = first + i * LANES + lane;
      const T power = power_of(static_cast<T>(logits[min(s, samples - 1)]), largest);
      sum += s < samples ? power : T(0);
    }
  }
  return sum_of_lanes<LANES>(sum);
}

// ---------------------------------------------------------------------------------- samples

// What a lane reads of a sample.
template <typename T>
struct Raw {
  T offset_x, offset_y, logit;
};

template <typename T, typename O>
__device__ __forceinline__ Raw<T> read_sample(const O* offset, const O* logit) {
  if constexpr (sizeof(O) == 2) {
    const Pair<float> two = unpack(__ldg(reinterpret_cast<const uint32_t*>(offset)), O());
    const auto bits = __ldg(reinterpret_cast<const unsigned short*>(logit));
    return {two.x, two.y, static_cast<T>(O(bits, O::from_bits()))};
  } else {
    const Pair<T> two = load_pair(offset);
    return {two.x, two.y, __ldg(logit)};
  }
}

// Where a sample lies. With a NaN or infinity it lies nowhere and has no corners.
template <typename T>
struct Sample {
  T x, y; // from the upper left corner, in cells
  bool is_inside; // of the map, or less than a cell away
  bool has[4]; // corners that are cells, and no padding: 0, 1 the upper ones, 2, 3 the lower
  int32_t upper, lower; // channels from the image's first to corner 0 and to corner 2
  T slope_x, slope_y; // cells for one unit of offset
  Pair<T> valid; // cells for one unit of reference

  __device__ __forceinline__ T bilinear(int i) const {
    return (i % 2 ? x : T(1) - x) * (i / 2 ? y : T(1) - y);
  }
};

// `valid_sizes` of the image, `reference` of the query.
template <typename S, typename O, typename T>
__device__ __forceinline__ Sample<T> locate(
    const Problem<S, O, T>& problem,
    const T* valid_sizes,
    const T* reference,
    int32_t image,
    int32_t stride,
    int32_t s,
    const Raw<T>& raw,
    bool exists) {
  const Geometry& g = problem.g;
  const auto l = static_cast<int32_t>(__umulhi(2 * s, problem.inverse_points)); // s / points
  const Level level = g.level[l];
  if (problem.reference_levels > 1) {
    reference += l * problem.coordinates;
  }
  Sample<T> sample;
  sample.valid = load_pair(valid_sizes + 2 * l);
  sample.slope_x = sample.slope_y = T(1);
  const Pair<T> centre = load_pair(reference);
  if (problem.coordinates == 4) {
    const Pair<T> size = load_pair(reference + 2);
    sample.slope_x = size.x * sample.valid.x * problem.half_by_points;
    sample.slope_y = size.y * sample.valid.y * problem.half_by_points;
  }
  T x = centre.x * sample.valid.x + raw.offset_x * sample.slope_x - T(0.5);
  T y = centre.y * sample.valid.y + raw.offset_y * sample.slope_y - T(0.5);
  const T width = static_cast<T>(level.width), height = static_cast<T>(level.height);
  // NaN is inside of nothing. Only what lies inside is converted to an integer: none overflows.
  const bool is_inside = exists && x > T(-1) && x < width && y > T(-1) && y < height;
  x = is_inside ? x : T(0);
  y = is_inside ? y : T(0);
  const T left_edge = floor(x), top_edge = floor(y);
  const int32_t left = static_cast<int32_t>(left_edge), top = static_cast<int32_t>(top_edge);
  sample.x = x - left_edge;
  sample.y = y - top_edge;
  sample.is_inside = is_inside;
  const bool has_left = is_inside && left >= 0, has_right = is_inside && left + 1 < level.width;
  const bool has_top = top >= 0, has_bottom = top + 1 < level.height;
  sample.has[0] = has_left && has_top;
  sample.has[1] = has_right && has_top;
  sample.has[2] = has_left && has_bottom;
  sample.has[3] = has_right && has_bottom;
  const int32_t token = level.start + top * level.width + left;
  sample.upper = token * stride;
  sample.lower = sample.upper + level.width * stride;
  if (problem.padding != nullptr) {
    const bool* padding = problem.padding + static_cast<int64_t>(image) * g.tokens + token;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sample.has[i] = sample.has[i] && !padding[(i / 2) * level.width + i % 2];
    }
  }
  return sample;
}

} // namespace dn_detr
