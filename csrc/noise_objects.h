// Arithmetic of denoising noise, bit-identical on the CPU, on CUDA and in the PyTorch reference
// implementation (projects/dn_detr/ops/noise_objects.py, which documents it). Fused multiply-adds
// are off: they round once instead of twice.
#pragma once

#include <cstdint>

#include "philox.h"

#if defined(__clang__) && !defined(__CUDACC__)
#pragma clang fp contract(off)
#elif defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace dn_detr {

// Words 0-3 of BOX_DRAW move the four coordinates. Of LABEL_DRAW, word 0 decides whether the label
// changes, 1 is the new class, the low 4 bits of 2 are the signs, and 3 orders the objects.
constexpr uint32_t BOX_DRAW = 0, LABEL_DRAW = 1;
// Memory-efficient attention requires rows of the mask to start at multiples of 16 elements.
constexpr int64_t MASK_PITCH = 16;

struct NoiseOptions {
  int64_t batch, most_objects; // B, M
  int64_t groups, slots, kinds; // kinds of slots in a group: positives (, negatives)
  int64_t num_classes;
  int64_t matched; // N
  double box_noise, label_noise;
  bool hide_empty;

  DN_DETR_HOST_DEVICE int64_t group_size() const { return kinds * slots; }
  DN_DETR_HOST_DEVICE int64_t total_slots() const { return groups * kinds * slots; } // T
  DN_DETR_HOST_DEVICE int64_t side() const { return total_slots() + matched; } // of the mask
  DN_DETR_HOST_DEVICE int64_t pitch() const {
    return (side() + MASK_PITCH - 1) / MASK_PITCH * MASK_PITCH;
  }
  // Slots of each kind in a group that their group may attend to: the first ones.
  DN_DETR_HOST_DEVICE int64_t visible_slots(int64_t num_objects) const {
    return hide_empty && num_objects < slots ? num_objects : slots;
  }
};

DN_DETR_HOST_DEVICE Words draw(int64_t key, int64_t object, int64_t stream, uint32_t id) {
  return philox(
      static_cast<uint64_t>(key),
      {{static_cast<uint32_t>(object), static_cast<uint32_t>(stream), id, 0}});
}

template <typename T>
DN_DETR_HOST_DEVICE T add(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {
    return __fadd_rn(a, b);
  } else {
    return __dadd_rn(a, b);
  }
#else
  return a + b;
#endif
}

template <typename T>
DN_DETR_HOST_DEVICE T multiply(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {
    return __fmul_rn(a, b);
  } else {
    return __dmul_rn(a, b);
  }
#else
  return a * b;
#endif
}

// Clamps to [0, 1]; NaN stays NaN.
template <typename T>
DN_DETR_HOST_DEVICE T clamp01(T x) {
  return x < T(0) ? T(0) : (x > T(1) ? T(1) : x);
}

// Uniform in [0, 1), a multiple of 2^-24.
template <typename T>
DN_DETR_HOST_DEVICE T uniform(uint32_t word) {
  return multiply(static_cast<T>(word >> 8), T(1) / T(1 << 24));
}

template <typename T>
DN_DETR_HOST_DEVICE void move_box(const T* box, const Words& words, T noise, T* out) {
  for (int i = 0; i < 4; ++i) {
    const T scaled = multiply(add(multiply(uniform<T>(words.word[i]), T(2)), T(-1)), noise);
    out[i] = i < 2 ? clamp01(add(box[i], multiply(scaled, multiply(box[i + 2], T(0.5)))))
                   : clamp01(multiply(box[i], add(scaled, T(1))));
  }
}

template <typename T>
DN_DETR_HOST_DEVICE void move_sides(
    const T* box,
    const Words& words,
    uint32_t signs,
    bool is_negative,
    T noise,
    T* out) {
  T sides[4]; // x1, y1, x2, y2
  for (int i = 0; i < 4; ++i) {
    const T half = multiply(box[2 + i % 2], T(0.5));
    T reach = uniform<T>(words.word[i]);
    reach = is_negative ? add(reach, T(1)) : reach;
    reach = (signs >> i & 1) ? -reach : reach;
    const T side = add(box[i % 2], i < 2 ? -half : half);
    sides[i] = clamp01(add(side, multiply(multiply(reach, noise), half)));
  }
  for (int i = 0; i < 2; ++i) {
    const T size = add(sides[i + 2], -sides[i]);
    out[i] = multiply(add(sides[i], sides[i + 2]), T(0.5));
    out[i + 2] = size < T(0) ? T(0) : size;
  }
}

// One image's part of the inputs and outputs.
template <typename T>
struct NoiseImage {
  const int64_t* labels; // [M]
  const T* boxes; // [M, 4]
  int64_t key;
  int64_t num_objects;
  int64_t* out_labels; // [T]
  T* out_boxes; // [T, 4]
  int64_t* assignment; // [T]
  bool* is_empty; // [T]
};

// Slot of object `m` in a group, or -1: m itself if all objects fit, else the rank of its draw
// among those of all objects.
DN_DETR_HOST_DEVICE int64_t slot_of_object(
    const NoiseOptions& o,
    int64_t key,
    int64_t num_objects,
    int64_t group,
    int64_t m) {
  if (num_objects <= o.slots) {
    return m;
  }
  const uint32_t own = draw(key, m, 2 * group, LABEL_DRAW).word[3];
  int64_t rank = 0;
  for (int64_t other = 0; other < num_objects; ++other) {
    const uint32_t word = draw(key, other, 2 * group, LABEL_DRAW).word[3];
    rank += word < own || (word == own && other < m) ? 1 : 0;
  }
  return rank < o.slots ? rank : -1;
}

// Writes slot t of the image, which has no object.
template <typename T>
DN_DETR_HOST_DEVICE void leave_empty(const NoiseImage<T>& image, int64_t t) {
  image.is_empty[t] = true;
  image.assignment[t] = -1;
  image.out_labels[t] = 0;
  for (int i = 0; i < 4; ++i) {
    image.out_boxes[4 * t + i] = T(0.5);
  }
}

// Writes slot t of the image, of a kind, from object `m` and its two draws.
template <typename T>
DN_DETR_HOST_DEVICE void noise_slot(
    const NoiseOptions& o,
    const NoiseImage<T>& image,
    int64_t t,
    int64_t kind,
    int64_t m,
    const Words& moves,
    const Words& other) {
  image.is_empty[t] = false;
  image.assignment[t] = kind == 0 ? m : -1;
  const bool is_flipped = uniform<double>(other.word[0]) < o.label_noise;
  const auto random_class =
      static_cast<int64_t>(static_cast<uint64_t>(other.word[1]) * o.num_classes >> 32);
  image.out_labels[t] = is_flipped ? random_class : image.labels[m];
  const T noise = static_cast<T>(o.box_noise);
  if (o.kinds == 1) {
    move_box(image.boxes + 4 * m, moves, noise, image.out_boxes + 4 * t);
  } else {
    move_sides(
        image.boxes + 4 * m, moves, other.word[2], kind == 1, noise, image.out_boxes + 4 * t);
  }
}

// Writes the slots of a group, of all kinds, for index `m` in [0, M): those of object m or, if
// there is no such object, the empty slots m.
template <typename T>
DN_DETR_HOST_DEVICE void noise_index(
    const NoiseOptions& o,
    const NoiseImage<T>& image,
    int64_t group,
    int64_t m) {
  const bool is_object = m < image.num_objects;
  const int64_t slot =
      is_object ? slot_of_object(o, image.key, image.num_objects, group, m) : m;
  if (slot < 0 || slot >= o.slots) {
    return;
  }
  for (int64_t kind = 0; kind < o.kinds; ++kind) {
    const int64_t t = (group * o.kinds + kind) * o.slots + slot;
    if (is_object) {
      const int64_t stream = 2 * group + kind;
      noise_slot(
          o, image, t, kind, m, draw(image.key, m, stream, BOX_DRAW),
          draw(image.key, m, stream, LABEL_DRAW));
    } else {
      leave_empty(image, t);
    }
  }
}

// Which keys query (row) i of the mask may attend to.
class MaskRow {
 public:
  DN_DETR_HOST_DEVICE MaskRow(const NoiseOptions& o, int64_t num_objects, int32_t i)
      : own_(i),
        end_(static_cast<int32_t>(o.total_slots())),
        slots_(static_cast<int32_t>(o.slots)) {
    const auto size = static_cast<int32_t>(o.group_size());
    const bool is_slot = i < end_;
    first_ = is_slot ? i / size * size : 0;
    size_ = is_slot ? size : 0;
    visible_ = static_cast<int32_t>(o.visible_slots(num_objects));
  }

  DN_DETR_HOST_DEVICE bool attends_to(int32_t key) const {
    const int32_t offset = key - first_; // in the group
    const int32_t slot = offset < slots_ ? offset : offset - slots_; // negatives follow positives
    return key >= end_ || key == own_ || (offset >= 0 && offset < size_ && slot < visible_);
  }

 private:
  int32_t own_, end_, slots_, first_, size_, visible_;
};

} // namespace dn_detr
