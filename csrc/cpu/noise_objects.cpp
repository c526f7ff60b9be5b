// Noised copies of the ground truth and their attention mask, in one pass on the CPU.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "../noise_objects.h"
#include "../noise_objects_checks.h"

namespace dn_detr {
namespace {

template <typename T>
void write_slots(const NoiseOptions& o, const NoiseImage<T>& image) {
  for (int64_t group = 0; group < o.groups; ++group) {
    for (int64_t m = 0; m < o.most_objects; ++m) {
      noise_place(o, image, group, m);
    }
  }
}

// By runs of equal numbers, which is as fast as memory: most of the time goes into the mask.
template <typename T>
void write_mask_row(const NoiseOptions& o, int64_t num_objects, int64_t i, T* row) {
  const T hidden = -std::numeric_limits<T>::infinity(), visible = 0;
  const int64_t slots = o.total_slots();
  std::fill(row, row + slots, hidden);
  if (i < slots) {
    const int64_t shown = o.hide_empty ? std::min(num_objects, o.slots) : o.slots;
    T* kind = row + i / o.group_size() * o.group_size();
    for (int64_t k = 0; k < o.kinds; ++k, kind += o.slots) {
      std::fill(kind, kind + shown, visible);
    }
    row[i] = visible;
  }
  std::fill(row + slots, row + o.side(), visible);
  std::fill(row + o.side(), row + o.pitch(), hidden);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> noise_objects(
    const at::Tensor& labels_,
    const at::Tensor& boxes_,
    const at::Tensor& is_object_,
    const at::Tensor& noise_keys_,
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
  check_noise_objects(o, labels_, boxes_, is_object_, noise_keys_, mask_dtype);
  const auto labels = labels_.contiguous(), boxes = boxes_.contiguous();
  const auto is_object = is_object_.contiguous(), noise_keys = noise_keys_.contiguous();
  const NoisedSlots out = empty_noised_slots(o, labels, boxes, mask_dtype);

  const int64_t slots = o.total_slots(), most = o.most_objects;
  std::vector<int64_t> counts(o.batch);
  for (int64_t b = 0; b < o.batch; ++b) {
    const bool* flags = is_object.const_data_ptr<bool>() + b * most;
    counts[b] = std::count(flags, flags + most, true);
  }
  AT_DISPATCH_FLOATING_TYPES(boxes.scalar_type(), "noise_objects", [&] {
    for (int64_t b = 0; b < o.batch; ++b) {
      write_slots<scalar_t>(
          o, {labels.const_data_ptr<int64_t>() + b * most,
              boxes.const_data_ptr<scalar_t>() + b * most * 4,
              noise_keys.const_data_ptr<int64_t>()[b], counts[b],
              out.labels.mutable_data_ptr<int64_t>() + b * slots,
              out.boxes.mutable_data_ptr<scalar_t>() + b * slots * 4,
              out.assignment.mutable_data_ptr<int64_t>() + b * slots,
              out.is_empty.mutable_data_ptr<bool>() + b * slots});
    }
  });
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, mask_dtype, "noise_objects", [&] {
    scalar_t* rows = out.mask.mutable_data_ptr<scalar_t>();
    // At least a MiB for each thread: waking one takes as long as writing some of it.
    const int64_t row_bytes = std::max<int64_t>(1, o.pitch() * sizeof(scalar_t));
    const int64_t grain = (int64_t{1} << 20) / row_bytes + 1;
    at::parallel_for(0, o.batch * o.side(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        write_mask_row(o, counts[row / o.side()], row % o.side(), rows + row * o.pitch());
      }
    });
  });
  return out.result();
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CPU, m) {
  m.impl("noise_objects", noise_objects);
}

} // namespace dn_detr
