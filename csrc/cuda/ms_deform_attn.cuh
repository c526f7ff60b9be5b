// Device code shared by all kernels of deformable attention.
//
// A group of LANES neighbouring lanes handles one (image, query, head). Each lane loads VECTOR
// channels, 16 bytes of the stored type S, and computes in T. With 32 channels, a warp has 8 groups
// in half precision and 4 in float32. Neighbouring groups are heads of one query.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../ms_deform_attn.h"

namespace dn_detr {

constexpr int MAX_LEVELS = 64;
constexpr int THREADS = 256;

// Passed to kernels by value, so no copy to the device is needed.
struct Geometry {
  int32_t batch, tokens, heads, channels, queries, points, levels;
  Level level[MAX_LEVELS];

  __host__ __device__ int32_t stride() const { return heads * channels; } // token to token
};

inline Geometry geometry_of(const Sizes& sizes) {
  const auto levels = static_cast<int64_t>(sizes.levels.size());
  TORCH_CHECK_VALUE(levels <= MAX_LEVELS, "expected at most ", MAX_LEVELS, " levels, got ", levels);
  Geometry g{static_cast<int32_t>(sizes.batch), static_cast<int32_t>(sizes.tokens),
             static_cast<int32_t>(sizes.heads), static_cast<int32_t>(sizes.channels),
             static_cast<int32_t>(sizes.queries), static_cast<int32_t>(sizes.points),
             static_cast<int32_t>(levels), {}};
  std::copy(sizes.levels.begin(), sizes.levels.end(), g.level);
  return g;
}

// Contiguous and aligned to 16 bytes; a slice of a tensor may not be.
inline at::Tensor aligned(const at::Tensor& x) {
  const auto y = x.contiguous();
  return reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 == 0 ? y : y.clone();
}

// Blocks of images (y) and of their queries and heads (x).
inline dim3 grid_of(const Geometry& g, int lanes) {
  const int64_t groups = static_cast<int64_t>(g.queries) * g.heads, per_block = THREADS / lanes;
  return dim3(static_cast<unsigned>((groups + per_block - 1) / per_block),
              static_cast<unsigned>(std::min(g.batch, 65535)));
}

template <int N>
using Number = std::integral_constant<int, N>;

// Half precision is loaded in whole vectors only. Other numbers of channels, which no known model
// has, are computed in float32, which saves compile time.
inline bool must_be_widened(const at::Tensor& value) {
  return value.element_size() == 2 && value.size(3) % 8 != 0;
}

// Calls launch(VECTOR, LANES), both std::integral_constant: whole vectors where they divide the
// channels, else single channels.
template <typename S, typename F>
void choose_tiling(int64_t channels, const F& launch) {
  constexpr int vector = 16 / sizeof(S);
  if constexpr (sizeof(S) < 8) { // float64 is for gradient checks
    if (channels % vector == 0) {
      const int64_t vectors = channels / vector;
      if (vectors <= 4) {
        return launch(Number<vector>(), Number<4>());
      }
      if (vectors <= 8) {
        return launch(Number<vector>(), Number<8>());
      }
      if (vectors <= 16) {
        return launch(Number<vector>(), Number<16>());
      }
      return launch(Number<vector>(), Number<32>());
    }
  }
  if constexpr (sizeof(S) > 2) { // see must_be_widened
    if (channels <= 8) {
      return launch(Number<1>(), Number<8>());
    }
    return launch(Number<1>(), Number<32>());
  }
}

// VECTOR stored values, loaded and stored with one instruction.
template <typename S, int VECTOR>
struct alignas(sizeof(S) * VECTOR) Pack {
  S element[VECTOR];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      element[i] = S(0);
    }
  }

  __device__ __forceinline__ void load(const S* from) {
    if constexpr (sizeof(Pack) == 16) {
      *reinterpret_cast<uint4*>(this) = __ldg(reinterpret_cast<const uint4*>(from));
    } else {
      *this = *reinterpret_cast<const Pack*>(from);
    }
  }

  __device__ __forceinline__ void store(S* to) const {
    *reinterpret_cast<Pack*>(to) = *this;
  }
};

template <typename T>
struct Pair {
  T x, y;
};

// Two half-precision values of a 32-bit word.
__device__ __forceinline__ Pair<float> unpack(uint32_t word, c10::BFloat16) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

__device__ __forceinline__ Pair<float> unpack(uint32_t word, c10::Half) {
  const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&word));
  return {two.x, two.y};
}

template <typename S, int VECTOR, typename T>
__device__ __forceinline__ void unpack(const Pack<S, VECTOR>& pack, T (&element)[VECTOR]) {
  if constexpr (sizeof(S) == 2 && VECTOR % 2 == 0) {
    const uint32_t* word = reinterpret_cast<const uint32_t*>(&pack);
#pragma unroll
    for (int k = 0; k < VECTOR; k += 2) {
      const Pair<float> two = unpack(word[k / 2], S());
      element[k] = two.x;
      element[k + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      element[k] = static_cast<T>(pack.element[k]);
    }
  }
}

template <typename T>
__device__ __forceinline__ Pair<T> load_pair(const T* from) {
  using Raw = std::conditional_t<sizeof(T) == 4, float2, double2>;
  const Raw raw = __ldg(reinterpret_cast<const Raw*>(from));
  return {raw.x, raw.y};
}

constexpr unsigned ALL_LANES = 0xffffffffu;

// Sum over a group of lanes, in all of them. mask: lanes of the warp that take part.
template <int LANES, typename T>
__device__ __forceinline__ T sum_over_lanes(T x, unsigned mask = ALL_LANES) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(mask, x, distance);
  }
  return x;
}

// A sample and the four cells around it: 0 upper left, 1 upper right, 2 lower left, 3 lower right.
template <typename T>
struct SamplePosition {
  T x, y; // from the centre of the upper left cell, in cells
  bool is_inside; // the level, or less than a cell outside; false for NaN and infinity
  bool has[4]; // cells that exist; the others are not read, they could hold NaN
  int32_t token; // of the upper left cell

  // px, py: from the centre of the level's first cell, in cells.
  __device__ __forceinline__ SamplePosition(const Level& level, T px, T py, bool exists = true) {
    const T width = static_cast<T>(level.width), height = static_cast<T>(level.height);
    // False for NaN. Only positions inside are converted to integers, so none overflows.
    is_inside = exists && px > T(-1) && px < width && py > T(-1) && py < height;
    px = is_inside ? px : T(0);
    py = is_inside ? py : T(0);
    const T left_edge = floor(px), top_edge = floor(py);
    const int32_t left = static_cast<int32_t>(left_edge), top = static_cast<int32_t>(top_edge);
    x = px - left_edge;
    y = py - top_edge;
    const bool has_left = is_inside && left >= 0, has_right = is_inside && left + 1 < level.width;
    const bool has_top = top >= 0, has_bottom = top + 1 < level.height;
    has[0] = has_left && has_top;
    has[1] = has_right && has_top;
    has[2] = has_left && has_bottom;
    has[3] = has_right && has_bottom;
    token = level.start + top * level.width + left;
  }

  // location: in [0, 1], of the level.
  __device__ __forceinline__ SamplePosition(const Level& level, Pair<T> location)
      : SamplePosition(
            level,
            location.x * static_cast<T>(level.width) - T(0.5),
            location.y * static_cast<T>(level.height) - T(0.5)) {}

  // Channels from the image's first one to cell i; unsigned, as it may overflow for one that does
  // not exist.
  __device__ __forceinline__ int32_t offset(int i, const Level& level, int32_t stride) const {
    const uint32_t step = stride;
    return static_cast<int32_t>(
        token * step + (i % 2 ? step : 0) + (i / 2 ? level.width * step : 0));
  }

  __device__ __forceinline__ T bilinear(int i) const {
    return (i % 2 ? x : T(1) - x) * (i / 2 ? y : T(1) - y);
  }
};

} // namespace dn_detr
