// The kernels of ms_deform_attn on the CPU, compiled once per instruction set: its inputs as a
// source of the shared loops, and the entries. No include guard.

#include "sampling_kernels.h"
#include "sampling_gradients.h"

template <typename T>
struct GivenSamples {
  const Sizes& z;
  const T* locations;
  const T* weights;
  T* grad_locations;
  T* grad_weights;

  // A location in [0, 1] is in the middle of the first cell at half a cell.
  void start(Samples<T>& s, int64_t) const {
    for (int64_t i = 0; i < s.count; ++i) {
      s.scale_x[i] = s.width[i];
      s.scale_y[i] = s.height[i];
      s.shift_x[i] = s.shift_y[i] = T(-0.5);
    }
  }

  void put(Samples<T>& s, int64_t row, int64_t head) const {
    const int64_t at = first_of(s, row, head);
    for (int64_t i = 0; i < s.count; ++i) {
      s.x[i] = locations[2 * (at + i)];
      s.y[i] = locations[2 * (at + i) + 1];
      s.attention[s.first + i] = weights[at + i];
    }
  }

  void take(Samples<T>& s, int64_t row, int64_t head) const {
    const int64_t at = first_of(s, row, head);
    for (int64_t i = 0; i < s.count; ++i) {
      grad_locations[2 * (at + i)] = s.grad_x[i] * s.scale_x[i];
      grad_locations[2 * (at + i) + 1] = s.grad_y[i] * s.scale_y[i];
      grad_weights[at + i] = s.grad_attention[i];
    }
  }

  void finish(Samples<T>&, int64_t) const {}

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

template <typename T, typename S>
void forward(const Sizes& z, const Inputs<T, S>& in, S* output, int64_t begin, int64_t end) {
  const GivenSamples<T> source{z, in.locations, in.weights, nullptr, nullptr};
  sample_rows<T>(z, source, in.value, output, begin, end);
}

template <typename T, typename S>
void differentiate(
    const Sizes& z,
    const Inputs<T, S>& in,
    const S* grad_output,
    T* grad_locations,
    T* grad_weights,
    int64_t begin,
    int64_t end) {
  const GivenSamples<T> source{z, in.locations, in.weights, grad_locations, grad_weights};
  differentiate_rows<T>(z, source, in.value, grad_output, begin, end);
}

template <typename T, typename S>
void scatter(
    const Sizes& z,
    const Inputs<T, S>& in,
    const S* grad_output,
    S* grad_value,
    const int32_t* order,
    int64_t parts,
    int64_t begin,
    int64_t end) {
  const GivenSamples<T> source{z, in.locations, in.weights, nullptr, nullptr};
  scatter_parts<T>(z, source, grad_output, grad_value, order, parts, begin, end);
}

template <typename T, typename S>
void backward(
    const Sizes& z,
    const Inputs<T, S>& in,
    const S* grad_output,
    S* grad_value,
    T* grad_locations,
    T* grad_weights,
    const int32_t* order,
    int64_t begin,
    int64_t end) {
  const GivenSamples<T> source{z, in.locations, in.weights, grad_locations, grad_weights};
  differentiate_heads<T>(z, source, in.value, grad_output, grad_value, order, begin, end);
}
