// ms_deform_attn on the CPU: vectorized over channels; multithreaded over queries or, for the
// gradient of the value, over disjoint parts of it. Deterministic.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../ms_deform_attn.h"
#include "tasks.h"

namespace dn_detr {
namespace {

template <typename T>
struct Inputs {
  const T* locations;
  const T* weights;
};

template <typename T>
struct Gradients {
  T* locations;
  T* weights;
};

#define KERNELS "ms_deform_attn_kernels.h"
#include "instruction_sets.h"
#include "sampling_operators.h"

// Checked inputs as the kernels need them.
struct Prepared {
  Prepared(
      const at::Tensor& value_,
      at::IntArrayRef spatial_shapes,
      const at::Tensor& locations_,
      const at::Tensor& weights_)
      : sizes(check_ms_deform_attn(value_, spatial_shapes, locations_, weights_)),
        value(without_half(value_)),
        locations(locations_.contiguous()),
        weights(weights_.contiguous()) {}

  template <typename T>
  Inputs<T> inputs() const {
    return {locations.const_data_ptr<T>(), weights.const_data_ptr<T>()};
  }

  Sizes sizes;
  at::Tensor value, locations, weights;
};

at::Tensor ms_deform_attn(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& locations,
    const at::Tensor& weights) {
  const Prepared p(value, spatial_shapes, locations, weights);
  const auto& z = p.sizes;
  auto output = at::empty({z.batch, z.queries, z.heads * z.channels}, p.value.options());
  with_types(p.value, p.locations, [&](auto t, auto s, auto) {
    using T = decltype(t);
    run_forward<T, decltype(s)>(z, p.inputs<T>(), p.value, output);
  });
  return output.to(value.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(
    const at::Tensor& grad_output,
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& locations,
    const at::Tensor& weights) {
  const Prepared p(value, spatial_shapes, locations, weights);
  check_grad_output(grad_output, value, p.sizes);
  const auto grad = without_half(grad_output);
  auto grad_value = at::empty_like(p.value);
  auto grad_locations = at::empty_like(p.locations), grad_weights = at::empty_like(p.weights);
  with_types(p.value, p.locations, [&](auto t, auto s, auto) {
    using T = decltype(t);
    const Gradients<T> out{
        grad_locations.mutable_data_ptr<T>(), grad_weights.mutable_data_ptr<T>()};
    run_backward<T, decltype(s)>(
        p.sizes, p.inputs<T>(), out, p.value, grad, grad_value, false);
  });
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights};
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CPU, m) {
  m.impl("ms_deform_attn", ms_deform_attn);
  m.impl("ms_deform_attn_backward", ms_deform_attn_backward);
}

} // namespace dn_detr
