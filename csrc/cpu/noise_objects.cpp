// Noised copies of the ground truth and their attention mask on the CPU.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <type_traits>
#include <tuple>
#include <utility>
#include <vector>

#include "../noise_objects.h"
#include "../noise_objects_checks.h"

namespace dn_detr {
namespace {

constexpr int DRAWS = 32;

#define KERNELS "noise_objects_kernels.h"
#include "instruction_sets.h"

// Collects slots until there are enough to draw random numbers for all of them at once.
template <typename T>
class Noiser {
 public:
  Noiser(const NoiseOptions& o, const NoiseImage<T>& image) : o_(o), image_(image) {}

  void add(int64_t group, int64_t kind, int64_t slot, int64_t m) {
    slot_[count_] = (group * o_.kinds + kind) * o_.slots + slot;
    object_[count_] = static_cast<uint32_t>(m);
    stream_[count_] = static_cast<uint32_t>(2 * group + kind);
    if (++count_ == DRAWS) {
      flush();
    }
  }

  void flush() {
    if (count_ == 0) {
      return;
    }
    const auto draw_many = KERNEL_FOR_THIS_CPU(draw_many);
    uint32_t moves[4][DRAWS], other[4][DRAWS];
    draw_many(image_.key, object_.data(), stream_.data(), BOX_DRAW, moves);
    draw_many(image_.key, object_.data(), stream_.data(), LABEL_DRAW, other);
    for (int n = 0; n < count_; ++n) {
      noise_slot(
          o_, image_, slot_[n], stream_[n] % 2, object_[n],
          Words{{moves[0][n], moves[1][n], moves[2][n], moves[3][n]}},
          Words{{other[0][n], other[1][n], other[2][n], other[3][n]}});
    }
    count_ = 0;
  }

 private:
  const NoiseOptions& o_;
  const NoiseImage<T>& image_;
  int count_ = 0;
  std::array<int64_t, DRAWS> slot_{};
  std::array<uint32_t, DRAWS> object_{}, stream_{};
};

// Objects of the slots of a group: in order if all fit, else those with the smallest draws.
void choose_objects(
    const NoiseOptions& o,
    int64_t key,
    int64_t group,
    std::vector<std::pair<uint32_t, int64_t>>& objects) {
  const auto num_objects = static_cast<int64_t>(objects.size());
  for (int64_t m = 0; m < num_objects; ++m) {
    const bool fits = num_objects <= o.slots;
    objects[m] = {fits ? 0 : draw(key, m, 2 * group, LABEL_DRAW).word[3], m};
  }
  if (num_objects > o.slots) {
    std::partial_sort(objects.begin(), objects.begin() + o.slots, objects.end());
  }
}

template <typename T>
void write_slots(const NoiseOptions& o, const NoiseImage<T>& image) {
  Noiser<T> noiser(o, image);
  std::vector<std::pair<uint32_t, int64_t>> objects(image.num_objects);
  const int64_t filled = std::min(image.num_objects, o.slots);
  for (int64_t group = 0; group < o.groups && o.slots > 0; ++group) {
    choose_objects(o, image.key, group, objects);
    for (int64_t kind = 0; kind < o.kinds; ++kind) {
      for (int64_t slot = 0; slot < filled; ++slot) {
        noiser.add(group, kind, slot, objects[slot].second);
      }
      for (int64_t slot = filled; slot < o.slots; ++slot) {
        leave_empty(image, (group * o.kinds + kind) * o.slots + slot);
      }
    }
  }
  noiser.flush();
}

// Row i of the mask: 0 where query i may attend to a key, else and in the padding -inf.
template <typename T>
void write_mask_row(const NoiseOptions& o, int64_t num_objects, int64_t i, T* row) {
  const T hidden = -std::numeric_limits<T>::infinity(), visible = 0;
  const int64_t slots = o.total_slots();
  std::fill(row, row + slots, hidden);
  std::fill(row + slots, row + o.side(), visible);
  std::fill(row + o.side(), row + o.pitch(), hidden);
  if (i < slots) {
    T* group = row + i / o.group_size() * o.group_size();
    for (int64_t kind = 0; kind < o.kinds; ++kind) {
      std::fill_n(group + kind * o.slots, o.visible_slots(num_objects), visible);
    }
    row[i] = visible;
  }
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
  const auto labels = labels_.contiguous(), boxes = boxes_.contiguous();
  const auto is_object = is_object_.contiguous(), noise_seeds = noise_seeds_.contiguous();
  const int64_t slots = o.total_slots(), most = o.most_objects, side = o.side();
  const NoisedSlots out = empty_noised_slots(o, labels, boxes);
  const auto mask = at::empty({o.batch, 1, side, o.pitch()}, boxes.options().dtype(mask_dtype));
  std::vector<int64_t> num_objects(o.batch);

  // Waking a thread takes as long as noising a few hundred slots.
  const int64_t grain = 1024 / std::max<int64_t>(1, slots) + 1;
  AT_DISPATCH_FLOATING_TYPES(boxes.scalar_type(), "noise_objects", [&] {
    using T = scalar_t;
    at::parallel_for(0, o.batch, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const bool* flags = is_object.const_data_ptr<bool>() + b * most;
        num_objects[b] = std::count(flags, flags + most, true);
        write_slots<T>(
            o, {labels.const_data_ptr<int64_t>() + b * most,
                boxes.const_data_ptr<T>() + b * most * 4,
                noise_seeds.const_data_ptr<int64_t>()[b], num_objects[b],
                out.labels.mutable_data_ptr<int64_t>() + b * slots,
                out.boxes.mutable_data_ptr<T>() + b * slots * 4,
                out.assignment.mutable_data_ptr<int64_t>() + b * slots,
                out.is_empty.mutable_data_ptr<bool>() + b * slots});
      }
    });
  });
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, mask_dtype, "noise_objects", [&] {
    scalar_t* rows = mask.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, o.batch * side, 256, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        write_mask_row(o, num_objects[row / side], row % side, rows + row * o.pitch());
      }
    });
  });
  return {out.labels, out.boxes, out.assignment, out.is_empty, mask.narrow(-1, 0, side)};
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CPU, m) {
  m.impl("noise_objects", noise_objects);
}

} // namespace dn_detr
