// Matching costs of objects and the queries of their image on the CPU, all layers in one call.

#include <ATen/Dispatch.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "../matching_costs.h"
#include "matching_common.h"

namespace dn_detr {
namespace {

// Slots of an image and layer per task; their arrays fit in the L1 cache.
constexpr int64_t BLOCK = 256;

template <typename T>
struct MatchObject {
  int64_t label, row; // row: index in the list of objects
  const T* box;
};

// Costs of some slots of one layer and image; strides: from one slot to the next.
template <typename T>
struct MatchTask {
  const T *logits, *boxes;
  int64_t logit_stride, box_stride;
  int64_t slots, classes;
  const MatchObject<T>* objects; // of the image, ordered by label
  int64_t count;
  T* cost; // of the first slot
  int64_t pitch; // from one object's row to the next
};

#define KERNELS "matching_costs_kernels.h"
#include "instruction_sets.h"

// The objects of each image, sorted by label, so that objects of a class share its costs.
template <typename T>
std::vector<MatchObject<T>> list_objects(
    const MatchSizes& z,
    const std::vector<int64_t>& first,
    const at::Tensor& labels,
    const at::Tensor& boxes) {
  const int64_t* label = labels.const_data_ptr<int64_t>();
  std::vector<MatchObject<T>> list;
  for (int64_t t = 0; t < z.objects; ++t) {
    TORCH_CHECK_VALUE(
        label[t] >= 0 && label[t] < z.classes, "expected labels in [0, ", z.classes, "), got ",
        label[t]);
    list.push_back({label[t], t, boxes.const_data_ptr<T>() + 4 * t});
  }
  for (int64_t b = 0; b < z.batch; ++b) {
    std::stable_sort(
        list.begin() + first[b], list.begin() + first[b + 1],
        [](const auto& one, const auto& other) { return one.label < other.label; });
  }
  return list;
}

template <typename T>
void run(
    const MatchSizes& z,
    const at::Tensor& logits,
    const at::Tensor& boxes,
    const std::vector<int64_t>& first,
    const std::vector<MatchObject<T>>& objects,
    const MatchWeights& weights,
    bool is_softmax,
    const at::Tensor& cost) {
  const T* logits_at = logits.const_data_ptr<T>();
  const T* boxes_at = boxes.const_data_ptr<T>();
  T* cost_at = cost.mutable_data_ptr<T>();
  const auto kernel = KERNEL_FOR_THIS_CPU(match_costs<T>);
  const int64_t blocks = (z.slots + BLOCK - 1) / BLOCK;
  parallel_for_dynamic(z.layers * z.batch * blocks, [&](int64_t i) {
    const int64_t l = i / blocks / z.batch, b = i / blocks % z.batch, q = i % blocks * BLOCK;
    MatchTask<T> task;
    task.slots = std::min(BLOCK, z.slots - q);
    task.classes = z.classes;
    task.logit_stride = logits.stride(2);
    task.box_stride = boxes.stride(2);
    task.logits = logits_at + l * logits.stride(0) + b * logits.stride(1) + q * logits.stride(2);
    task.boxes = boxes_at + l * boxes.stride(0) + b * boxes.stride(1) + q * boxes.stride(2);
    task.objects = objects.data() + first[b];
    task.count = first[b + 1] - first[b];
    task.cost = cost_at + l * z.objects * z.slots + q;
    task.pitch = z.slots;
    if (task.count > 0) {
      kernel(task, weights, is_softmax);
    }
  });
}

at::Tensor matching_costs(
    const at::Tensor& logits_,
    const at::Tensor& boxes_,
    const at::Tensor& image_of,
    const at::Tensor& labels_,
    const at::Tensor& object_boxes_,
    double class_cost,
    double l1,
    double giou,
    bool is_softmax,
    double alpha,
    double gamma) {
  const MatchSizes z = check_matching_costs(logits_, boxes_, image_of, labels_, object_boxes_);
  const auto logits = logits_.stride(3) == 1 ? logits_ : logits_.contiguous();
  const auto boxes = boxes_.stride(3) == 1 ? boxes_ : boxes_.contiguous();
  auto cost = at::empty({z.layers, z.objects, z.slots}, logits.options());
  const std::vector<int64_t> first = first_of_each_image(image_of, z.batch);
  const auto labels = labels_.contiguous(), object_boxes = object_boxes_.contiguous();
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "matching_costs", [&] {
    const auto objects = list_objects<scalar_t>(z, first, labels, object_boxes);
    run(z, logits, boxes, first, objects, {class_cost, l1, giou, alpha, gamma}, is_softmax, cost);
  });
  return cost;
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CPU, m) {
  m.impl("matching_costs", matching_costs);
}

} // namespace dn_detr
