// Checks and outputs of the noise operator, for CPU and CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cmath>

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
  check_images(0, o.batch);
  TORCH_CHECK_VALUE(
      o.slots >= 0 && o.slots <= o.most_objects, "expected slots_per_group in [0, ",
      o.most_objects, "], got ", o.slots);
  check_product("num_groups * M", {o.groups, o.most_objects}, 38);
  check_product("num_groups * slots_per_group", {o.groups, o.kinds, o.slots}, 30);
  check_product("num_matched", {o.matched}, 30);
  check_product("num_classes", {o.num_classes}, 31);
  TORCH_CHECK_VALUE(o.num_classes > 0, "expected num_classes > 0, got ", o.num_classes);
  TORCH_CHECK_VALUE(
      std::isfinite(o.box_noise) && std::isfinite(o.label_noise),
      "expected box_noise and label_noise to be finite, got ", o.box_noise, " and ",
      o.label_noise);
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
