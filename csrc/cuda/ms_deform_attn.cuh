// What the forward and the backward of deformable attention share on the GPU.
//
// A group of LANES neighbouring lanes does one (image, query, head); each lane has VECTOR channels
// of it, 16 bytes of the stored type S, and computes in T. With 32 channels that is 8 groups in a
// warp for half precision and 4 for float32. Neighbouring groups are heads of one query.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../ms_deform_attn.h"

namespace dn_detr {

constexpr int MAX_LEVELS = 64;
constexpr int THREADS = 256;

// Passed by value: nothing waits for sizes to arrive on the device.
struct Geometry {
  int32_t batch, tokens, heads, channels, queries, points, levels;
  Level level[MAX_LEVELS];

  __host__ __device__ int32_t stride() const { return heads * channels; } // token to token
};

inline Geometry geometry_of(const Sizes& sizes) {
  const auto levels = static_cast<int64_t>(sizes.levels.size());
  TORCH_CHECK_VALUE(levels <= MAX_LEVELS, "expected at most ", MAX_LEVELS, " levels, got ", levels);
  const int64_t most = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(
      sizes.queries * sizes.heads * 32 < most && sizes.points < most && sizes.batch < most,
      "expected Q * H below 2^26, got ", sizes.queries * sizes.heads);
  Geometry g{static_cast<int32_t>(sizes.batch), static_cast<int32_t>(sizes.tokens),
             static_cast<int32_t>(sizes.heads), static_cast<int32_t>(sizes.channels),
             static_cast<int32_t>(sizes.queries), static_cast<int32_t>(sizes.points),
             static_cast<int32_t>(levels), {}};
  std::copy(sizes.levels.begin(), sizes.levels.end(), g.level);
  return g;
}

// Contiguous and on a 16-byte boundary, which a slice of a tensor need not be.
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

// Half precision is read in whole vectors only. Other numbers of channels, which no model has, take
// the way of float32: so there is less to compile.
inline bool must_be_widened(const at::Tensor& value) {
  return value.element_size() == 2 && value.size(3) % 8 != 0;
}

// Calls launch(VECTOR, LANES), both std::integral_constant, for channels of type S: whole vectors
// where the channels divide into them, else single channels.
template <typename S, typename F>
void choose_tiling(int64_t channels, const F& launch) {
  constexpr int vector = 16 / sizeof(S);
  if constexpr (sizeof(S) < 8) { // float64 is for checking gradients
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

// VECTOR stored numbers, read and written at once. Zero where nothing was read.
template <typename S, int VECTOR>
struct alignas(sizeof(S) * VECTOR) Pack {
  S number[VECTOR];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      number[i] = S(0);
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

// Two numbers in a word.
__device__ __forceinline__ Pair<float> unpack(uint32_t word, c10::BFloat16) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

__device__ __forceinline__ Pair<float> unpack(uint32_t word, c10::Half) {
  const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&word));
  return {two.x, two.y};
}

template <typename S, int VECTOR, typename T>
__device__ __forceinline__ void unpack(const Pack<S, VECTOR>& pack, T (&number)[VECTOR]) {
  if constexpr (sizeof(S) == 2 && VECTOR % 2 == 0) {
    const uint32_t* word = reinterpret_cast<const uint32_t*>(&pack);
#pragma unroll
    for (int k = 0; k < VECTOR; k += 2) {
      const Pair<float> two = unpack(word[k / 2], S());
      number[k] = two.x;
      number[k + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      number[k] = static_cast<T>(pack.number[k]);
    }
  }
}

template <typename T>
__device__ __forceinline__ Pair<T> load_pair(const T* from) {
  using Raw = std::conditional_t<sizeof(T) == 4, float2, double2>;
  const Raw raw = __ldg(reinterpret_cast<const Raw*>(from));
  return {raw.x, raw.y};
}

// The four corners around a sample: 0 upper left, 1 upper right, 2 lower left, 3 lower right.
template <typename T>
struct Place {
  T x, y; // from the upper left corner
  bool is_inside; // of the map, or less than a cell away
  int32_t offset, right, down; // of that corner in its image, and from it to the others
  bool has[4]; // corners outside are not read: they could hold NaN

  // NaN is inside of nothing. Only what lies inside is converted to an integer: none overflows.
  __device__ __forceinline__ Place(const Level& level, Pair<T> location, int32_t stride) {
    const T width = static_cast<T>(level.width), height = static_cast<T>(level.height);
    T px = location.x * width - T(0.5), py = location.y * height - T(0.5);
    is_inside = px > T(-1) && px < width && py > T(-1) && py < height;
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
    offset = (level.start + top * level.width + left) * stride;
    right = stride;
    down = level.width * stride;
  }

  __device__ __forceinline__ int32_t corner(int i) const {
    return offset + (i % 2 ? right : 0) + (i / 2 ? down : 0);
  }

  __device__ __forceinline__ T weight(int i) const {
    return (i % 2 ? x : T(1) - x) * (i / 2 ? y : T(1) - y);
  }
};

} // namespace dn_detr
