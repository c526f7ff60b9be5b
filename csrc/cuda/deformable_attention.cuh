// Device code shared by forward and backward of the fused deformable attention.
//
// A group of LANES neighbouring lanes handles one (image, query, head). Each lane computes the
// position and the corner weights of one sample, LANES samples at a time. The group then loops over
// these samples: their values are broadcast by shuffles, and each lane loads its 16 bytes of
// channels of every corner. Only addresses are computed redundantly.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../deformable_attention.h"
#include "deformable_attention_tiles.cuh"
#include "ms_deform_attn.cuh"

namespace dn_detr {

// S: type of the values, O: of offsets and logits, T: of the computation.
template <typename S, typename O, typename T>
struct Params {
  Geometry g;
  TileSchedule schedule;
  int32_t first_image; // of this launch
  int32_t samples; // levels * points, of a query and head
  uint32_t inverse_points; // 2^31 / points, rounded up
  int32_t coordinates, reference_levels;
  int32_t value_bytes, sum_bytes; // see `advance`
  T half_by_points; // 0.5 / points
  const S* value; // [B, S, H, D]
  const T* valid_sizes; // [B, levels, 2]
  const T* reference; // [B, Q, reference_levels, coordinates]
  const O* offsets; // [B, Q, H, levels, P, 2]
  const O* logits; // [B, Q, H, levels * P]
  const bool* padding; // [B, S] or null
};

// The inputs, contiguous and aligned; `Params` points into them.
struct DeformableInputs {
  at::Tensor value, valid_sizes, reference, offsets, logits, padding;

  template <typename S, typename O, typename T>
  Params<S, O, T> params(const DeformableSizes& sizes) const {
    Params<S, O, T> params{};
    params.g = geometry_of(sizes);
    params.samples = static_cast<int32_t>(sizes.samples());
    params.inverse_points = static_cast<uint32_t>(((int64_t{1} << 31) - 1) / sizes.points + 1);
    params.coordinates = static_cast<int32_t>(sizes.coordinates);
    params.reference_levels = static_cast<int32_t>(sizes.reference_levels);
    params.value_bytes = sizeof(S);
    params.half_by_points = static_cast<T>(0.5 / static_cast<double>(sizes.points));
    params.value = value.const_data_ptr<S>();
    params.valid_sizes = valid_sizes.const_data_ptr<T>();
    params.reference = reference.const_data_ptr<T>();
    params.offsets = offsets.const_data_ptr<O>();
    params.logits = logits.const_data_ptr<O>();
    params.padding = padding.defined() ? padding.const_data_ptr<bool>() : nullptr;
    return params;
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

// blockIdx.z: image, of which a launch has at most 65535.
template <typename Kernel, typename P, typename... Outputs>
void launch_on_images(Kernel kernel, P params, Outputs... outputs) {
  for (int32_t first = 0; first < params.g.batch; first += 65535) {
    dim3 grid = params.schedule.launch_grid(params.g);
    grid.z = std::min(params.g.batch - first, 65535);
    params.first_image = first;
    kernel<<<grid, params.schedule.threads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        params, outputs...);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

// ------------------------------------------------------------------------------------ lanes

template <int LANES, typename T>
__device__ __forceinline__ T shuffle(T x, int source) {
  return __shfl_sync(ALL_LANES, x, source, LANES);
}

// Stops the compiler from recomputing a pointer in every iteration of a loop.
template <typename T>
__device__ __forceinline__ void pin_in_register(T*& pointer) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(pointer));
#endif
}

// `from + by` as one instruction, of integers: a corner that does not exist has no valid address.
// It is formed before the test of the corner, as a predicated load needs its address.
// size: sizeof(T), a kernel argument so that it stays one.
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

__device__ __forceinline__ float exp2_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); // error up to 2^-22
  return y;
#else
  return std::exp2(x);
#endif
}

__device__ __forceinline__ double exp2_approx(double x) {
  return exp2(x);
}

// e^(logit - largest) = 2^((logit - largest) / log(2))
template <typename T>
__device__ __forceinline__ T exp_shifted(T logit, T largest) {
  return exp2_approx((logit - largest) * T(1.4426950408889634));
}

// The largest logit of a query and head. NaN is ignored here: it shows in the sum.
template <int LANES, typename T, typename O>
__device__ __forceinline__ T max_logit(const O* logits, int32_t samples, int32_t lane) {
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

// The denominator of the softmax.
template <int LANES, typename T, typename O>
__device__ __forceinline__ T sum_of_exps(
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
      const T exp_logit = exp_shifted(static_cast<T>(logits[min(s, samples - 1)]), largest);
      sum += s < samples ? exp_logit : T(0);
    }
  }
  return sum_over_lanes<LANES>(sum);
}

// ---------------------------------------------------------------------------------- samples

// The inputs of one sample.
template <typename T>
struct RawSample {
  T offset_x, offset_y, logit;
};

template <typename T, typename O>
__device__ __forceinline__ RawSample<T> read_sample(const O* offset, const O* logit) {
  if constexpr (sizeof(O) == 2) {
    const Pair<float> two = unpack(__ldg(reinterpret_cast<const uint32_t*>(offset)), O());
    const auto bits = __ldg(reinterpret_cast<const unsigned short*>(logit));
    return {two.x, two.y, static_cast<T>(O(bits, O::from_bits()))};
  } else {
    const Pair<T> two = load_pair(offset);
    return {two.x, two.y, __ldg(logit)};
  }
}

template <typename T>
struct Sample : SamplePosition<T> { // without corners that are padding
  int32_t upper, lower; // channels from the image's first one to corners 0 and 2
  T slope_x, slope_y; // cells per unit of offset
  Pair<T> valid; // cells per unit of reference
};

// The query and head of a group of lanes, and their inputs.
template <typename O, typename T>
struct QueryInputs : QuerySlot {
  int32_t image;
  int64_t row; // of the B * Q * H rows
  const T* valid_sizes; // of the image
  const T* reference; // of the query
  const O* logits;
};

template <int LANES, typename S, typename O, typename T>
__device__ __forceinline__ QueryInputs<O, T> find_query(const Params<S, O, T>& params) {
  const Geometry& g = params.g;
  QueryInputs<O, T> q{find_query_slot<LANES>(params.schedule)};
  q.image = params.first_image + blockIdx.z;
  const int64_t query = static_cast<int64_t>(q.image) * g.queries + q.query;
  q.row = query * g.heads + q.head;
  q.valid_sizes = params.valid_sizes + static_cast<int64_t>(q.image) * 2 * g.levels;
  q.reference = params.reference + query * (params.reference_levels * params.coordinates);
  q.logits = params.logits + q.row * params.samples;
  return q;
}

// Sample s of a query. Samples that do not exist are inside of nothing and have no corners.
template <typename S, typename O, typename T>
__device__ __forceinline__ Sample<T> locate(
    const Params<S, O, T>& params,
    const QueryInputs<O, T>& q,
    int32_t stride,
    int32_t s,
    const RawSample<T>& raw,
    bool exists) {
  const auto l = static_cast<int32_t>(__umulhi(2 * s, params.inverse_points)); // s / points
  const Level level = params.g.level[l];
  const T* reference = q.reference;
  if (params.reference_levels > 1) {
    reference += l * params.coordinates;
  }
  const Pair<T> valid = load_pair(q.valid_sizes + 2 * l);
  const Pair<T> centre = load_pair(reference);
  T slope_x = T(1), slope_y = T(1);
  if (params.coordinates == 4) {
    const Pair<T> size = load_pair(reference + 2);
    slope_x = size.x * valid.x * params.half_by_points;
    slope_y = size.y * valid.y * params.half_by_points;
  }
  const SamplePosition<T> position(
      level, centre.x * valid.x + raw.offset_x * slope_x - T(0.5),
      centre.y * valid.y + raw.offset_y * slope_y - T(0.5), exists);
  // Unsigned: beyond the last cell, the product may exceed 31 bits.
  const uint32_t step = stride, upper = position.token * step, lower = upper + level.width * step;
  Sample<T> sample{position, static_cast<int32_t>(upper), static_cast<int32_t>(lower), slope_x,
                   slope_y, valid};
  if (params.padding != nullptr) {
    const int64_t first = static_cast<int64_t>(q.image) * params.g.tokens + position.token;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sample.has[i] = sample.has[i] && !params.padding[first + (i / 2) * level.width + i % 2];
    }
  }
  return sample;
}

} // namespace dn_detr
