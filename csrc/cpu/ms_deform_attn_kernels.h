// The kernels of ms_deform_attn on the CPU: its inputs as a source of the shared loops. No include
// guard: compiled once per instruction set.

#include "sampling_kernels.h"
#include "sampling_gradients.h"

template <typename T>
struct GivenSamples {
  const Sizes& z;
  const T* locations;
  const T* weights;
  T* grad_locations;
  T* grad_weights;

  // Locations are in [0, 1]; the centre of the first cell is at half a cell.
  void start_query(Samples<T>& s, int64_t) const {
    for (int64_t i = 0; i < s.count; ++i) {
      s.scale_x[i] = s.width[i];
      s.scale_y[i] = s.height[i];
      s.shift_x[i] = s.shift_y[i] = T(-0.5);
    }
  }

  void load_head(Samples<T>& s, int64_t row, int64_t head) const {
    const int64_t at = first_of(s, row, head);
    for (int64_t i = 0; i < s.count; ++i) {
      s.x[i] = locations[2 * (at + i)];
      s.y[i] = locations[2 * (at + i) + 1];
      s.attention[s.first + i] = weights[at + i];
    }
  }

  void store_head(Samples<T>& s, int64_t row, int64_t head) const {
    const int64_t at = first_of(s, row, head);
    for (int64_t i = 0; i < s.count; ++i) {
      grad_locations[2 * (at + i)] = s.grad_x[i] * s.scale_x[i];
      grad_locations[2 * (at + i) + 1] = s.grad_y[i] * s.scale_y[i];
      grad_weights[at + i] = s.grad_attention[i];
    }
  }

  void finish_query(Samples<T>&, int64_t) const {}

  void prefetch_head(int64_t row, int64_t head) const {
    const int64_t n = z.samples(), first = (row * z.heads + head) * n;
    prefetch(locations + 2 * first, 2 * n);
    prefetch(weights + first, n);
    prefetch_to_write(grad_locations + 2 * first, 2 * n);
    prefetch_to_write(grad_weights + first, n);
  }

  const bool* padding_of(int64_t) const {
    return nullptr;
  }

  int64_t first_of(const Samples<T>& s, int64_t row, int64_t head) const {
    return (row * z.heads + head) * z.samples() + s.first;
  }
};

template <typename T>
GivenSamples<T> source_of(const Sizes& z, const Inputs<T>& in) {
  return {z, in.locations, in.weights, nullptr, nullptr};
}

template <typename T>
GivenSamples<T> source_of(const Sizes& z, const Inputs<T>& in, const Gradients<T>& out) {
  return {z, in.locations, in.weights, out.locations, out.weights};
}

#include "sampling_entries.h"
