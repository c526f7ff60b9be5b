// The attention mask of noised slots on the CPU, in memory that outlives the step.
//
// A mask is far larger than all else that noise makes, and most of it never changes: which keys the
// matched queries see, and that slots see them. So a mask that nobody holds any more is kept, and
// the next one of its size is made from it by changing what its slots see of each other. For this the
// matched queries stand at the end of memory that has room for `capacity` slots before them, and what
// is given away is its lower right part.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <deque>
#include <limits>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "../noise_objects.h"

namespace dn_detr {

// What the slots of an image show to their groups: the first `objects` of each kind.
struct Shown {
  int64_t groups = 0, kinds = 0, slots = 0, objects = 0;
};

struct NoiseMask {
  at::Tensor memory; // [B, 1, capacity + N, pitch]
  int64_t capacity;
  std::vector<Shown> shown; // of each image
  int64_t version; // of the memory when it was given away: a later one says that it was changed

  at::Tensor of_slots(int64_t slots) const { // [B, 1, slots + N, slots + N]
    const int64_t side = memory.size(2) - capacity + slots, unused = capacity - slots;
    // A view, which shares the count of changes; that it has no gradient need not be found out.
    const at::AutoDispatchBelowAutograd guard;
    return memory.as_strided(
        {memory.size(0), 1, side, side}, memory.strides(), unused * memory.stride(2) + unused);
  }
};

// In a row of an image's memory: writes `number` where the slot sees the objects [from, to) of its group,
// and where it sees itself. Rows that are no slots stay.
template <typename T>
void write_visible(
    const Shown& shown,
    int64_t row,
    int64_t capacity,
    int64_t from,
    int64_t to,
    T number,
    T* keys) {
  const int64_t size = shown.kinds * shown.slots, first = capacity - shown.groups * size;
  if (row < first) {
    return;
  }
  T* kind = keys + first + (row - first) / size * size;
  for (int64_t k = 0; k < shown.kinds; ++k, kind += shown.slots) {
    std::fill(kind + from, kind + std::max(from, to), number);
  }
  keys[row] = number;
}

// Changes the mask of an image to what it shows now.
template <typename T>
void show(NoiseMask& mask, int64_t image, const Shown& now) {
  const T hidden = -std::numeric_limits<T>::infinity(), visible = 0;
  const Shown before = std::exchange(mask.shown[image], now);
  const bool has_same_slots = before.groups == now.groups && before.kinds == now.kinds &&
      before.slots == now.slots;
  if (has_same_slots && before.objects == now.objects) {
    return;
  }
  const int64_t pitch = mask.memory.size(3);
  T* keys = mask.memory.mutable_data_ptr<T>() + image * mask.memory.stride(0);
  for (int64_t row = 0; row < mask.capacity; ++row, keys += pitch) {
    write_visible(
        before, row, mask.capacity, has_same_slots ? now.objects : 0, before.objects, hidden, keys);
    write_visible(
        now, row, mask.capacity, has_same_slots ? before.objects : 0, now.objects, visible, keys);
  }
}

inline NoiseMask new_noise_mask(
    int64_t batch,
    int64_t matched,
    int64_t capacity,
    at::ScalarType dtype) {
  const int64_t side = capacity + matched;
  const int64_t pitch = (side + MASK_PITCH - 1) / MASK_PITCH * MASK_PITCH;
  NoiseMask mask{
      at::empty({batch, 1, side, pitch}, at::dtype(dtype)), capacity, std::vector<Shown>(batch), 0};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "noise_objects", [&] {
    scalar_t* rows = mask.memory.mutable_data_ptr<scalar_t>();
    const scalar_t hidden = -std::numeric_limits<scalar_t>::infinity();
    at::parallel_for(0, batch * side, 256, [&](int64_t begin, int64_t end) {
      for (scalar_t* row = rows + begin * pitch; row < rows + end * pitch; row += pitch) {
        std::fill(row, row + capacity, hidden);
        std::fill(row + capacity, row + side, scalar_t(0));
        std::fill(row + side, row + pitch, hidden);
      }
    });
  });
  return mask;
}

// The masks that were given away last. All methods may be called by several threads.
class OldMasks {
 public:
  static constexpr size_t MOST = 4;

  // One that nobody else holds, with room for so many slots, or none.
  std::optional<NoiseMask> take(
      int64_t batch,
      int64_t matched,
      int64_t slots,
      at::ScalarType dtype) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto mask = masks_.begin(); mask != masks_.end(); ++mask) {
      if (mask->memory.scalar_type() != dtype || mask->memory.size(0) != batch ||
          mask->memory.size(2) - mask->capacity != matched ||
          mask->memory.storage().use_count() > 1) {
        continue;
      }
      NoiseMask found = std::move(*mask);
      masks_.erase(mask);
      const bool is_known = found.memory._version() == found.version;
      return is_known && found.capacity >= slots ? std::optional(std::move(found)) : std::nullopt;
    }
    return std::nullopt;
  }

  void keep(NoiseMask mask) {
    mask.version = mask.memory._version();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (masks_.size() == MOST) {
      masks_.pop_front();
    }
    masks_.push_back(std::move(mask));
  }

 private:
  std::mutex mutex_;
  std::deque<NoiseMask> masks_;
};

} // namespace dn_detr
