// Noised copies of the ground truth and their attention mask on the GPU, in one launch.

#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "../noise_objects.h"
#include "../noise_objects_checks.h"

namespace dn_detr {
namespace {

constexpr int THREADS = 256, WARP = 32, ROWS = THREADS / WARP; // mask rows of a block

template <typename T>
struct NoiseBatch {
  const int64_t* labels;
  const T* boxes;
  const bool* is_object;
  const int64_t* noise_seeds;
  int64_t* out_labels;
  T* out_boxes;
  int64_t* assignment;
  bool* is_empty;
};

template <typename S>
struct alignas(16) Chunk {
  static constexpr int size = 16 / sizeof(S);
  S element[size];
};

// blockIdx.y: image. The first `slot_blocks` blocks write slots, one thread per object and group;
// the others write the mask, one warp per row, 16 bytes per lane.
template <typename T, typename S>
__global__ void __launch_bounds__(THREADS) noise_kernel(
    const NoiseOptions o,
    const NoiseBatch<T> batch,
    unsigned slot_blocks,
    S hidden,
    S* mask) {
  const int64_t b = blockIdx.y, slots = o.total_slots(), most = o.most_objects;
  int64_t num_objects = 0;
  for (int64_t first = 0; first < most; first += THREADS) {
    const int64_t m = first + threadIdx.x;
    num_objects += __syncthreads_count(m < most && batch.is_object[b * most + m]);
  }
  if (blockIdx.x < slot_blocks) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (index < o.groups * most) {
      const NoiseImage<T> image{
          batch.labels + b * most, batch.boxes + b * most * 4, batch.noise_seeds[b], num_objects,
          batch.out_labels + b * slots, batch.out_boxes + b * slots * 4,
          batch.assignment + b * slots, batch.is_empty + b * slots};
      noise_index(o, image, index / most, index % most);
    }
    return;
  }
  const auto i = static_cast<int32_t>((blockIdx.x - slot_blocks) * ROWS + threadIdx.x / WARP);
  if (i >= o.side()) {
    return;
  }
  const MaskRow row(o, num_objects, i);
  const auto side = static_cast<int32_t>(o.side()), pitch = static_cast<int32_t>(o.pitch());
  S* to = mask + (b * side + i) * pitch;
  constexpr int32_t size = Chunk<S>::size;
  for (int32_t first = threadIdx.x % WARP * size; first < pitch; first += WARP * size) {
    Chunk<S> keys;
#pragma unroll
    for (int k = 0; k < size; ++k) {
      const int32_t key = first + k;
      keys.element[k] = key < side && row.attends_to(key) ? S(0) : hidden;
    }
    *reinterpret_cast<Chunk<S>*>(to + first) = keys;
  }
}

int64_t blocks_for(int64_t work, int64_t of_block) {
  return (work + of_block - 1) / of_block;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> noise_objects(
    const at::Tensor& labels_,
    const at::Tensor& boxes_,
    const at::Tensor& is_object_,
    const at::Tensor& noise_seeds_,
    int64_t num_groups,
    int64_t slots_per_group,
    int64_t num_classes,
    double box_noise,
    double label_noise,
    bool contrastive,
    int64_t num_matched,
    at::ScalarType mask_dtype,
    bool hide_empty) {
  check_ndim(labels_, "labels", 2, "[B, M]");
  const NoiseOptions o{labels_.size(0), labels_.size(1), num_groups, slots_per_group,
                       contrastive ? 2 : 1, num_classes, num_matched, box_noise,
                       label_noise, hide_empty};
  check_noise_objects(o, labels_, boxes_, is_object_, noise_seeds_, mask_dtype);
  const c10::cuda::CUDAGuard guard(labels_.device());
  const auto labels = labels_.contiguous(), boxes = boxes_.contiguous();
  const auto is_object = is_object_.contiguous(), noise_seeds = noise_seeds_.contiguous();
  const NoisedSlots out = empty_noised_slots(o, labels, boxes);
  const auto mask = at::empty({o.batch, 1, o.side(), o.pitch()}, boxes.options().dtype(mask_dtype));

  const int64_t slot_blocks =
      blocks_for(o.slots == 0 ? 0 : o.groups * o.most_objects, THREADS);
  const int64_t blocks = slot_blocks + blocks_for(o.side(), ROWS);
  if (blocks * o.batch > 0) {
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(o.batch));
    const auto stream = c10::cuda::getCurrentCUDAStream();
    AT_DISPATCH_FLOATING_TYPES(boxes.scalar_type(), "noise_objects", [&] {
      using T = scalar_t;
      const NoiseBatch<T> batch{
          labels.const_data_ptr<int64_t>(), boxes.const_data_ptr<T>(),
          is_object.const_data_ptr<bool>(), noise_seeds.const_data_ptr<int64_t>(),
          out.labels.mutable_data_ptr<int64_t>(), out.boxes.mutable_data_ptr<T>(),
          out.assignment.mutable_data_ptr<int64_t>(), out.is_empty.mutable_data_ptr<bool>()};
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, mask_dtype, "noise_objects", [&] {
        noise_kernel<<<grid, THREADS, 0, stream>>>(
            o, batch, static_cast<unsigned>(slot_blocks),
            -std::numeric_limits<scalar_t>::infinity(), mask.mutable_data_ptr<scalar_t>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
    });
  }
  return {out.labels, out.boxes, out.assignment, out.is_empty, mask.narrow(-1, 0, o.side())};
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CUDA, m) {
  m.impl("noise_objects", noise_objects);
}

} // namespace dn_detr
