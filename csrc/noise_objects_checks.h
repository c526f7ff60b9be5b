// Checks and outputs of the noise operator, for CPU and CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <limits>

#include "checks.h"
#include "noise_objects.h"

namespace dn_detr {

inline void check_noise_objects(
    const NoiseOptions& o,
    const at::Tensor& labels,
    const at::Tensor& boxes,
    const at::Tensor& is_object,
    const at::Tensor& noise_seeds,
    at::ScalarType mask_dtype) {
  check_shape(boxes, "boxes", {o.batch, o.most_objects, 4});
  check_shape(is_object, "is_object", {o.batch, o.most_objects});
  check_shape(noise_seeds, "noise_seeds", {o.batch});
  check_dtype(labels, "labels", {at::kLong});
  check_dtype(boxes, "boxes", {at::kFloat, at::kDouble});
  check_dtype(is_object, "is_object", {at::kBool});
  check_dtype(noise_seeds, "noise_seeds", {at::kLong});
  check_device(boxes, "boxes", labels);
  check_device(is_object, "is_object", labels);
  check_device(noise_seeds, "noise_seeds", labels);
  TORCH_CHECK_VALUE(
      o.groups >= 0 && o.slots >= 0 && o.slots <= o.most_objects,
      "expected num_groups >= 0 and slots_per_group in [0, ", o.most_objects, "], got ", o.groups,
      " and ", o.slots);
  TORCH_CHECK_VALUE(
      o.num_classes > 0 && o.matched >= 0, "expected num_classes > 0 and num_matched >= 0, got ",
      o.num_classes, " and ", o.matched);
  TORCH_CHECK_VALUE(
      o.side() < std::numeric_limits<int32_t>::max(), "expected less than 2^31 queries, got ",
      o.side());
  TORCH_CHECK_VALUE(
      mask_dtype == at::kFloat || mask_dtype == at::kDouble || mask_dtype == at::kHalf ||
          mask_dtype == at::kBFloat16,
      "expected mask_dtype to be a floating point type, got ", mask_dtype);
}

// All outputs but the mask.
struct NoisedSlots {
  at::Tensor labels, boxes, assignment, is_empty;
};

inline NoisedSlots empty_noised_slots(
    const NoiseOptions& o,
    const at::Tensor& labels,
    const at::Tensor& boxes) {
  const int64_t slots = o.total_slots();
  return {at::empty({o.batch, slots}, labels.options()),
          at::empty({o.batch, slots, 4}, boxes.options()),
          at::empty({o.batch, slots}, labels.options()),
          at::empty({o.batch, slots}, labels.options().dtype(at::kBool))};
}

} // namespace dn_detr
