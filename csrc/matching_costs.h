// Sizes, weights and checks of the matching costs, for CPU and CUDA;
// projects/dn_detr/ops/matching.py documents them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "host_device.h"
#include "checks.h"

namespace dn_detr {

struct MatchWeights {
  double class_cost, l1, giou, alpha, gamma;
};

struct MatchSizes {
  int64_t layers, batch, slots, classes, objects; // L, B, Q, K, T
};

inline MatchSizes check_matching_costs(
    const at::Tensor& logits,
    const at::Tensor& boxes,
    const at::Tensor& image_of,
    const at::Tensor& labels,
    const at::Tensor& object_boxes) {
  check_ndim(logits, "logits", 4, "[L, B, Q, K]");
  check_ndim(image_of, "image_of", 1, "[T]");
  const MatchSizes z{logits.size(0), logits.size(1), logits.size(2), logits.size(3),
                     image_of.size(0)};
  check_images(z.layers, z.batch);
  check_product("Q", {z.slots}, 30);
  check_shape(boxes, "boxes", {z.layers, z.batch, z.slots, 4});
  check_shape(labels, "labels", {z.objects});
  check_shape(object_boxes, "object_boxes", {z.objects, 4});
  check_dtype(logits, "logits", {at::kFloat, at::kDouble});
  check_dtype(boxes, "boxes", {logits.scalar_type()});
  check_dtype(object_boxes, "object_boxes", {logits.scalar_type()});
  check_dtype(image_of, "image_of", {at::kLong});
  check_dtype(labels, "labels", {at::kLong});
  check_device(boxes, "boxes", logits);
  check_device(image_of, "image_of", logits);
  check_device(labels, "labels", logits);
  check_device(object_boxes, "object_boxes", logits);
  return z;
}

} // namespace dn_detr
