// Sizes and checks of ms_deform_attn, for CPU and CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <cstdint>

#include "checks.h"

namespace dn_detr {

struct Level {
  int32_t height;
  int32_t width;
  int32_t start; // first token
};

// Sizes, with the letters of the docstrings.
struct Sizes {
  int64_t batch, tokens, heads, channels; // value [B, S, H, D]
  int64_t queries, points; // sampling_locations or offsets [B, Q, H, levels, P, 2]
  c10::SmallVector<Level, 8> levels;

  int64_t samples() const { // of one query and head
    return static_cast<int64_t>(levels.size()) * points;
  }

  int64_t first_token(int64_t level) const { // after the last level: the number of tokens
    return level < static_cast<int64_t>(levels.size()) ? levels[level].start : tokens;
  }
};

// Type of the computation: values may be half precision, arithmetic is not.
inline at::ScalarType compute_type(const at::Tensor& value) {
  return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Checks a value and its levels; spatial_shapes: h and w of each level.
inline Sizes check_value(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    int64_t queries,
    int64_t points) {
  check_ndim(value, "value", 4, "[B, S, H, D]");
  check_dtype(value, "value", {at::kFloat, at::kHalf, at::kBFloat16, at::kDouble});
  TORCH_CHECK_VALUE(
      spatial_shapes.size() % 2 == 0,
      "expected spatial_shapes to be h and w of each level, got ", spatial_shapes.size(),
      " integers");
  Sizes sizes{value.size(0), value.size(1), value.size(2), value.size(3), queries, points, {}};
  // Offsets within an image are 32-bit, those of images 64-bit. The CUDA kernels have 32 threads for
  // a query and head, and divide sample numbers by P.
  check_product("S * H * D", {sizes.tokens, sizes.heads, sizes.channels}, 31);
  check_product("B", {sizes.batch}, 24);
  check_product("Q * H", {queries, sizes.heads}, 26);
  const auto levels = static_cast<int64_t>(spatial_shapes.size()) / 2;
  check_product("levels * P * P", {levels, points, points}, 31);
  int64_t start = 0;
  for (size_t i = 0; i < spatial_shapes.size(); i += 2) {
    const int64_t height = spatial_shapes[i], width = spatial_shapes[i + 1];
    check_product("h * w of spatial_shapes", {height, width}, 31);
    sizes.levels.push_back({static_cast<int32_t>(height), static_cast<int32_t>(width),
                            static_cast<int32_t>(start)});
    start += height * width;
  }
  TORCH_CHECK_VALUE(
      start == sizes.tokens, "expected spatial_shapes to hold S = ", sizes.tokens, " cells, got ",
      start, " in ", spatial_shapes);
  return sizes;
}

inline Sizes check_ms_deform_attn(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& locations,
    const at::Tensor& weights) {
  check_ndim(locations, "sampling_locations", 6, "[B, Q, H, levels, P, 2]");
  auto sizes = check_value(value, spatial_shapes, locations.size(1), locations.size(4));
  const int64_t b = sizes.batch, q = sizes.queries, h = sizes.heads, p = sizes.points;
  const auto levels = static_cast<int64_t>(sizes.levels.size());
  check_shape(locations, "sampling_locations", {b, q, h, levels, p, 2});
  check_shape(weights, "attention_weights", {b, q, h, levels, p});
  check_dtype(locations, "sampling_locations", {compute_type(value)});
  check_dtype(weights, "attention_weights", {compute_type(value)});
  check_device(locations, "sampling_locations", value);
  check_device(weights, "attention_weights", value);
  return sizes;
}

inline void check_grad_output(
    const at::Tensor& grad_output,
    const at::Tensor& value,
    const Sizes& sizes) {
  check_shape(
      grad_output, "grad_output", {sizes.batch, sizes.queries, sizes.heads * sizes.channels});
  check_dtype(grad_output, "grad_output", {value.scalar_type()});
  check_device(grad_output, "grad_output", value);
}

} // namespace dn_detr
