// Matching costs on the GPU, in one launch: one thread per slot of a layer and image computes the
// costs of all objects of its image.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../matching_costs.h"

namespace dn_detr {
namespace {

#include "../box_costs.h"

constexpr int THREADS = 128;

template <typename T>
struct CostInputs {
  const T *logits, *boxes; // [L, B, Q, K] and [L, B, Q, 4] of these strides; the last is 1
  int64_t logit_strides[3], box_strides[3];
  const int64_t *image_of, *labels;
  const T* object_boxes;
  T* cost; // [L, T, Q]
};

template <typename T>
__device__ T focal_cost(T x, T yes_weight, T no_weight, T gamma) {
  const T log_part = log1p(exp(x < 0 ? x : -x));
  const T minus_log_no = larger(x, T(0)) + log_part; // -log(1 - p)
  const T minus_log_yes = larger(-x, T(0)) + log_part; // -log(p)
  return yes_weight * exp(-gamma * minus_log_no) * minus_log_yes -
      no_weight * exp(-gamma * minus_log_yes) * minus_log_no;
}

// blockIdx: slots, image, layer.
template <typename T>
__global__ void __launch_bounds__(THREADS) cost_kernel(
    const CostInputs<T> in,
    const MatchSizes z,
    const MatchWeights weights,
    bool is_softmax) {
  const int64_t b = blockIdx.y, l = blockIdx.z;
  // The objects of an image are contiguous; the threads count those of all images together.
  int64_t first = 0, end = 0;
  for (int64_t start = 0; start < z.objects; start += THREADS) {
    const int64_t t = start + threadIdx.x;
    first += __syncthreads_count(t < z.objects && in.image_of[t] < b);
    end += __syncthreads_count(t < z.objects && in.image_of[t] <= b);
  }
  const int64_t q = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (q >= z.slots) {
    return;
  }
  const T* logits =
      in.logits + l * in.logit_strides[0] + b * in.logit_strides[1] + q * in.logit_strides[2];
  const T* box = in.boxes + l * in.box_strides[0] + b * in.box_strides[1] + q * in.box_strides[2];
  const MatchBox<T> own = match_box(box[0], box[1], box[2], box[3]);
  T largest = 0, total = 1;
  if (is_softmax && first < end) {
    largest = logits[0];
    for (int64_t k = 1; k < z.classes; ++k) {
      largest = larger(largest, logits[k]);
    }
    total = 0;
    for (int64_t k = 0; k < z.classes; ++k) {
      total += exp(logits[k] - largest);
    }
  }
  const T class_weight = static_cast<T>(weights.class_cost);
  const T yes_weight = static_cast<T>(weights.class_cost * weights.alpha);
  const T no_weight = static_cast<T>(weights.class_cost * (1 - weights.alpha));
  const T gamma = static_cast<T>(weights.gamma);
  const T l1 = static_cast<T>(weights.l1), giou = static_cast<T>(weights.giou);
  for (int64_t t = first; t < end; ++t) {
    const int64_t label = in.labels[t];
    CUDA_KERNEL_ASSERT(label >= 0 && label < z.classes);
    const T* target = in.object_boxes + 4 * t;
    const MatchBox<T> object = match_box(target[0], target[1], target[2], target[3]);
    const T x = logits[label];
    const T class_cost = is_softmax ? -class_weight * exp(x - largest) / total
                                    : focal_cost(x, yes_weight, no_weight, gamma);
    in.cost[(l * z.objects + t) * z.slots + q] =
        class_cost + box_cost<T, T>(own, object, l1, giou);
  }
}

at::Tensor matching_costs(
    const at::Tensor& logits_,
    const at::Tensor& boxes_,
    const at::Tensor& image_of_,
    const at::Tensor& labels_,
    const at::Tensor& object_boxes_,
    double class_cost,
    double l1,
    double giou,
    bool is_softmax,
    double alpha,
    double gamma) {
  const MatchSizes z = check_matching_costs(logits_, boxes_, image_of_, labels_, object_boxes_);
  const c10::cuda::CUDAGuard guard(logits_.device());
  const auto logits = logits_.stride(3) == 1 ? logits_ : logits_.contiguous();
  const auto boxes = boxes_.stride(3) == 1 ? boxes_ : boxes_.contiguous();
  const auto image_of = image_of_.contiguous(), labels = labels_.contiguous();
  const auto object_boxes = object_boxes_.contiguous();
  auto cost = at::empty({z.layers, z.objects, z.slots}, logits.options());
  if (cost.numel() == 0) {
    return cost;
  }
  const int64_t blocks = (z.slots + THREADS - 1) / THREADS;
  const dim3 grid(
      static_cast<unsigned>(blocks), static_cast<unsigned>(z.batch),
      static_cast<unsigned>(z.layers));
  const MatchWeights weights{class_cost, l1, giou, alpha, gamma};
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "matching_costs", [&] {
    using T = scalar_t;
    const CostInputs<T> in{
        logits.const_data_ptr<T>(),
        boxes.const_data_ptr<T>(),
        {logits.stride(0), logits.stride(1), logits.stride(2)},
        {boxes.stride(0), boxes.stride(1), boxes.stride(2)},
        image_of.const_data_ptr<int64_t>(),
        labels.const_data_ptr<int64_t>(),
        object_boxes.const_data_ptr<T>(),
        cost.mutable_data_ptr<T>()};
    cost_kernel<<<grid, THREADS, 0, c10::cuda::getCurrentCUDAStream()>>>(
        in, z, weights, is_softmax);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return cost;
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CUDA, m) {
  m.impl("matching_costs", matching_costs);
}

} // namespace dn_detr
