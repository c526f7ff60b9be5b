// Checks and outputs of the assignment operators, for CPU and CUDA.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"

namespace dn_detr {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// One segment of queries: costs [L, T, slots], with slots in groups of equal size.
struct MatchSegment {
  at::Tensor cost; // contiguous
  std::optional<at::Tensor> is_empty; // [B, slots] bool, contiguous
  int64_t layers, groups, group_slots, matches_per_object;
  at::Tensor object_of; // [L, B, slots], filled with -1
  at::Tensor is_bad; // [L, B], false

  int64_t problems(int64_t batch) const { return layers * batch * groups; }
};

inline std::vector<MatchSegment> check_assign_objects(
    at::TensorList costs,
    const at::Tensor& image_of,
    int64_t batch,
    const OptionalTensors& is_empty,
    at::IntArrayRef num_groups,
    at::IntArrayRef matches_per_object) {
  check_ndim(image_of, "image_of", 1, "[T]");
  check_dtype(image_of, "image_of", {at::kLong});
  check_images(0, batch);
  TORCH_CHECK_VALUE(
      is_empty.size() == costs.size() && num_groups.size() == costs.size() &&
          matches_per_object.size() == costs.size(),
      "expected is_empty, num_groups and matches_per_object for each of ", costs.size(),
      " segments, got ", is_empty.size(), ", ", num_groups.size(), " and ",
      matches_per_object.size());
  std::vector<MatchSegment> segments;
  for (size_t i = 0; i < costs.size(); ++i) {
    const at::Tensor& cost = costs[i];
    check_ndim(cost, "costs", 3, "[L, T, slots]");
    check_shape(cost, "costs", {cost.size(0), image_of.size(0), cost.size(2)});
    check_dtype(cost, "costs", {at::kFloat, at::kDouble});
    check_dtype(cost, "costs", {costs[0].scalar_type()});
    check_device(cost, "costs", image_of);
    TORCH_CHECK_VALUE(
        num_groups[i] > 0 && cost.size(2) % num_groups[i] == 0 && matches_per_object[i] > 0,
        "expected matches_per_object > 0 and num_groups to divide ", cost.size(2), " slots, got ",
        matches_per_object[i], " and ", num_groups[i]);
    check_product("slots", {cost.size(2)}, 30);
    check_product("L * B * num_groups", {cost.size(0), batch, num_groups[i]}, 31);
    check_product("T * matches_per_object", {cost.size(1), matches_per_object[i]}, 30);
    // More matches than slots have no effect.
    const int64_t group_slots = cost.size(2) / num_groups[i];
    MatchSegment segment{cost.contiguous(), is_empty.get(i), cost.size(0), num_groups[i],
                         group_slots, std::clamp<int64_t>(group_slots, 1, matches_per_object[i]),
                         {}, {}};
    if (segment.is_empty) {
      check_shape(*segment.is_empty, "is_empty", {batch, cost.size(2)});
      check_dtype(*segment.is_empty, "is_empty", {at::kBool});
      check_device(*segment.is_empty, "is_empty", image_of);
      segment.is_empty = segment.is_empty->contiguous();
    }
    segment.object_of = at::full({cost.size(0), batch, cost.size(2)}, -1, image_of.options());
    segment.is_bad = at::zeros({cost.size(0), batch}, image_of.options().dtype(at::kBool));
    segments.push_back(segment);
  }
  return segments;
}

inline std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> results(
    const std::vector<MatchSegment>& segments) {
  std::vector<at::Tensor> object_of, is_bad;
  for (const MatchSegment& segment : segments) {
    object_of.push_back(segment.object_of);
    is_bad.push_back(segment.is_bad);
  }
  return {object_of, is_bad};
}

inline void check_has_nonfinite(
    const at::Tensor& values,
    const std::optional<at::Tensor>& is_empty) {
  check_ndim(values, "values", 4, "[L, B, Q, C]");
  check_dtype(values, "values", {at::kFloat, at::kDouble});
  check_images(values.size(0), values.size(1));
  if (is_empty) {
    check_shape(*is_empty, "is_empty", {values.size(1), values.size(2)});
    check_dtype(*is_empty, "is_empty", {at::kBool});
    check_device(*is_empty, "is_empty", values);
  }
}

} // namespace dn_detr
