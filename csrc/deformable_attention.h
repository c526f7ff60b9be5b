// Sizes and checks of the fused deformable attention, for CPU and CUDA.
//
// Position of a sample in cells, from the corner of a level of valid size (w, h):
//   reference * valid + offset                            (a point, coordinates = 2)
//   (centre + offset * size * 0.5 / points) * valid       (a box, coordinates = 4)
// Its weight is the softmax of the logits over the levels and points of a head.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "ms_deform_attn.h"

namespace dn_detr {

struct DeformableSizes : Sizes {
  int64_t coordinates; // of a reference: 2 or 4
  int64_t reference_levels; // 1: reference [B, Q, 2 or 4] for all levels, else [B, Q, levels, ...]
};

// offsets and logits have the same type, that of the value or of the computation; reference and
// valid_sizes have the type of the computation.
inline DeformableSizes check_deformable_attention(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& valid_sizes,
    const at::Tensor& reference,
    const at::Tensor& offsets,
    const at::Tensor& logits,
    const std::optional<at::Tensor>& padding) {
  check_ndim(offsets, "offsets", 6, "[B, Q, H, levels, P, 2]");
  DeformableSizes z{check_value(value, spatial_shapes, offsets.size(1), offsets.size(4)), 0, 0};
  const auto levels = static_cast<int64_t>(z.levels.size());
  TORCH_CHECK_VALUE(levels > 0, "expected spatial_shapes of at least one level, got none");
  check_shape(offsets, "offsets", {z.batch, z.queries, z.heads, levels, z.points, 2});
  check_shape(logits, "logits", {z.batch, z.queries, z.heads, z.samples()});
  check_shape(valid_sizes, "valid_sizes", {z.batch, levels, 2});
  TORCH_CHECK_VALUE(
      (reference.dim() == 3 || reference.dim() == 4) &&
          (reference.size(-1) == 2 || reference.size(-1) == 4),
      "expected reference to be [B, Q, 2 or 4] or [B, Q, levels, 2 or 4], got ",
      reference.sizes());
  z.coordinates = reference.size(-1);
  if (reference.dim() == 3) {
    z.reference_levels = 1;
    check_shape(reference, "reference", {z.batch, z.queries, z.coordinates});
  } else {
    z.reference_levels = levels;
    check_shape(reference, "reference", {z.batch, z.queries, levels, z.coordinates});
  }
  check_dtype(valid_sizes, "valid_sizes", {compute_type(value)});
  check_dtype(reference, "reference", {compute_type(value)});
  check_dtype(offsets, "offsets", {value.scalar_type(), compute_type(value)});
  check_dtype(logits, "logits", {offsets.scalar_type()});
  check_device(valid_sizes, "valid_sizes", value);
  check_device(reference, "reference", value);
  check_device(offsets, "offsets", value);
  check_device(logits, "logits", value);
  if (padding) {
    check_shape(*padding, "padding", {z.batch, z.tokens});
    check_dtype(*padding, "padding", {at::kBool});
    check_device(*padding, "padding", value);
  }
  return z;
}

} // namespace dn_detr
