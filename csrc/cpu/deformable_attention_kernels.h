// The kernels of deformable_attention on the CPU: logits, references and offsets as a source of the
// shared loops. No include guard: compiled once per instruction set. O is the stored type of
// offsets and logits.

#include "sampling_kernels.h"
#include "sampling_gradients.h"

// Softmax of n values in place; x must have space for one more vector.
template <typename T>
void softmax(T* x, int64_t n) {
  using V = typename Simd<T>::vector;
  constexpr int64_t lanes = lanes_of<T>();
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  std::fill_n(x + n, lanes, lowest);
  V largest = V{} + lowest, sum = {}, number;
  for (int64_t i = 0; i < n; i += lanes) {
    load(number, x + i);
    largest = Max()(largest, number);
  }
  const T offset = fold_lanes<T, Max>(largest);
  for (int64_t i = 0; i < n; i += lanes) {
    load(number, x + i);
    number = exp_of_negative<T>(number - offset);
    sum += number;
    store(x + i, number);
  }
  const T factor = T(1) / fold_lanes<T, Add>(sum);
  for (int64_t i = 0; i < n; i += lanes) {
    load(number, x + i);
    store(x + i, number * factor);
  }
}

template <typename T, typename O>
struct Offsets {
  Offsets(const DeformableSizes& z, const Inputs<T, O>& in) : z(z), in(in) {}

  // The position of a sample in cells is offset * scale + shift.
  void start_query(Samples<T>& s, int64_t row) const {
    const auto levels = static_cast<int64_t>(z.levels.size());
    for (int64_t level = s.first_level, i = 0; level < s.last_level; ++level) {
      const T* valid = in.valid_sizes + (row / z.queries * levels + level) * 2;
      const T* reference = reference_of(row, level);
      const T shift_x = reference[0] * valid[0] - T(0.5);
      const T shift_y = reference[1] * valid[1] - T(0.5);
      const bool is_box = z.coordinates == 4;
      const T scale_x = is_box ? reference[2] * of_size() * valid[0] : T(1);
      const T scale_y = is_box ? reference[3] * of_size() * valid[1] : T(1);
      for (const int64_t end = i + z.points; i < end; ++i) {
        s.shift_x[i] = shift_x;
        s.shift_y[i] = shift_y;
        s.scale_x[i] = scale_x;
        s.scale_y[i] = scale_y;
      }
    }
  }

  void load_head(Samples<T>& s, int64_t row, int64_t head) const {
    const int64_t first = (row * z.heads + head) * z.samples();
    const O* offsets = in.offsets + 2 * (first + s.first);
    for (int64_t i = 0; i < s.count; ++i) {
      s.x[i] = offsets[2 * i];
      s.y[i] = offsets[2 * i + 1];
    }
    std::copy_n(in.logits + first, z.samples(), s.attention.data());
    softmax(s.attention.data(), z.samples());
  }

  const bool* padding_of(int64_t image) const {
    return in.padding[image];
  }

  const T* reference_of(int64_t row, int64_t level) const {
    return in.reference + index_of_reference(row, level);
  }

  int64_t index_of_reference(int64_t row, int64_t level) const {
    const int64_t shared = z.reference_levels == 1 ? row : row * z.reference_levels + level;
    return shared * z.coordinates;
  }

  // Offsets from a box are in units of half its size, divided by the number of points.
  T of_size() const {
    return T(0.5) / static_cast<T>(std::max<int64_t>(z.points, 1));
  }

  const DeformableSizes& z;
  const Inputs<T, O>& in;
};

// Offsets with gradients.
template <typename T, typename O>
struct OffsetGradients : Offsets<T, O> {
  using Offsets<T, O>::z;
  using Offsets<T, O>::in;

  OffsetGradients(const DeformableSizes& z, const Inputs<T, O>& in, const Gradients<T, O>& out)
      : Offsets<T, O>(z, in), out(out) {
    for (auto* sum : {&shift_x, &shift_y, &scale_x, &scale_y}) {
      sum->resize(z.samples());
    }
  }

  void start_query(Samples<T>& s, int64_t row) {
    Offsets<T, O>::start_query(s, row);
    if (out.reference == nullptr) {
      return;
    }
    for (auto* sum : {&shift_x, &shift_y, &scale_x, &scale_y}) {
      std::fill(sum->begin(), sum->end(), T(0));
    }
  }

  void store_head(const Samples<T>& s, int64_t row, int64_t head) {
    const int64_t first = (row * z.heads + head) * s.count;
    T mean = 0;
    for (int64_t i = 0; i < s.count; ++i) {
      mean += s.attention[i] * s.grad_attention[i];
    }
    for (int64_t i = 0; i < s.count; ++i) {
      out.logits[first + i] = s.attention[i] * (s.grad_attention[i] - mean);
      out.offsets[2 * (first + i)] = s.grad_x[i] * s.scale_x[i];
      out.offsets[2 * (first + i) + 1] = s.grad_y[i] * s.scale_y[i];
    }
    if (out.reference != nullptr) {
      for (int64_t i = 0; i < s.count; ++i) {
        shift_x[i] += s.grad_x[i];
        shift_y[i] += s.grad_y[i];
        // Samples outside add nothing: 0 * x may be NaN.
        scale_x[i] += s.corners[i] != 0 ? s.grad_x[i] * s.x[i] : 0;
        scale_y[i] += s.corners[i] != 0 ? s.grad_y[i] * s.y[i] : 0;
      }
    }
  }

  void finish_query(const Samples<T>& s, int64_t row) const {
    if (out.reference == nullptr) {
      return;
    }
    const auto levels = static_cast<int64_t>(z.levels.size());
    const int64_t row_size = z.reference_levels * z.coordinates;
    std::fill_n(out.reference + row * row_size, row_size, T(0));
    for (int64_t level = 0, i = 0; level < levels; ++level) {
      const T* valid = in.valid_sizes + (row / z.queries * levels + level) * 2;
      T sum[4] = {};
      for (const int64_t end = i + z.points; i < end; ++i) {
        sum[0] += shift_x[i];
        sum[1] += shift_y[i];
        sum[2] += scale_x[i];
        sum[3] += scale_y[i];
      }
      T* grad = out.reference + this->index_of_reference(row, level);
      for (int64_t c = 0; c < z.coordinates; ++c) {
        grad[c] += sum[c] * valid[c % 2] * (c < 2 ? T(1) : this->of_size());
      }
    }
  }

  void prefetch_head(int64_t row, int64_t head) const {
    const int64_t n = z.samples(), first = (row * z.heads + head) * n;
    prefetch(in.offsets + 2 * first, 2 * n);
    prefetch(in.logits + first, n);
    prefetch_to_write(out.offsets + 2 * first, 2 * n);
    prefetch_to_write(out.logits + first, n);
  }

  const Gradients<T, O>& out;
  std::vector<T> shift_x, shift_y, scale_x, scale_y; // gradients, summed over heads
};

template <typename T, typename O>
Offsets<T, O> source_of(const DeformableSizes& z, const Inputs<T, O>& in) {
  return {z, in};
}

template <typename T, typename O>
OffsetGradients<T, O> source_of(
    const DeformableSizes& z,
    const Inputs<T, O>& in,
    const Gradients<T, O>& out) {
  return {z, in, out};
}

#include "sampling_entries.h"
