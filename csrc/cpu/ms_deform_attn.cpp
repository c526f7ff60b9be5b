// ms_deform_attn on the CPU: vectorised over channels, threaded over queries or, for the gradient of
// the value, over disjoint parts of it; deterministic.

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

template <typename T, typename S>
struct Inputs {
  const S* value;
  const T* locations;
  const T* weights;
};

#define KERNELS "ms_deform_attn_kernels.h"
#include "instruction_sets.h"

// The inputs as the kernels want them: contiguous, float16 (which few CPUs widen) as float32.
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

  template <typename T, typename S>
  Inputs<T, S> inputs() const {
    return {value.const_data_ptr<S>(), locations.const_data_ptr<T>(), weights.const_data_ptr<T>()};
  }

  Sizes sizes;
  at::Tensor value, locations, weights;
};

template <typename T, typename S>
void run_forward(const Prepared& p, const at::Tensor& output) {
  const auto kernel = KERNEL_FOR_THIS_CPU(forward<T, S>);
  const auto in = p.inputs<T, S>();
  S* out = output.mutable_data_ptr<S>();
  for_rows(p.sizes, [&](int64_t begin, int64_t end) { kernel(p.sizes, in, out, begin, end); });
}

template <typename T, typename S>
void run_backward(
    const Prepared& p,
    const at::Tensor& grad_output,
    const at::Tensor& grad_value,
    const at::Tensor& grad_locations,
    const at::Tensor& grad_weights) {
  const auto in = p.inputs<T, S>();
  const S* grad = grad_output.const_data_ptr<S>();
  S* value = grad_value.mutable_data_ptr<S>();
  T* locations = grad_locations.mutable_data_ptr<T>();
  T* weights = grad_weights.mutable_data_ptr<T>();
  const auto order = order_of_queries(p.sizes);
  if (has_heads_for_all_threads(p.sizes)) {
    const auto backward = KERNEL_FOR_THIS_CPU(backward<T, S>);
    for_heads(p.sizes, [&](int64_t begin, int64_t end) {
      backward(p.sizes, in, grad, value, locations, weights, order.data(), begin, end);
    });
    return;
  }
  const auto differentiate = KERNEL_FOR_THIS_CPU(differentiate<T, S>);
  const auto scatter = KERNEL_FOR_THIS_CPU(scatter<T, S>);
  for_rows(p.sizes, [&](int64_t begin, int64_t end) {
    differentiate(p.sizes, in, grad, locations, weights, begin, end);
  });
  for_parts(p.sizes, [&](int64_t parts, int64_t begin, int64_t end) {
    scatter(p.sizes, in, grad, value, order.data(), parts, begin, end);
  });
}

at::Tensor ms_deform_attn(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& locations,
    const at::Tensor& weights) {
  const Prepared p(value, spatial_shapes, locations, weights);
  const auto& z = p.sizes;
  auto output = at::empty({z.batch, z.queries, z.heads * z.channels}, p.value.options());
  switch (p.value.scalar_type()) {
    case at::kDouble:
      run_forward<double, double>(p, output);
      break;
    case at::kBFloat16:
      run_forward<float, at::BFloat16>(p, output);
      break;
    default:
      run_forward<float, float>(p, output);
  }
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
  switch (p.value.scalar_type()) {
    case at::kDouble:
      run_backward<double, double>(p, grad, grad_value, grad_locations, grad_weights);
      break;
    case at::kBFloat16:
      run_backward<float, at::BFloat16>(p, grad, grad_value, grad_locations, grad_weights);
      break;
    default:
      run_backward<float, float>(p, grad, grad_value, grad_locations, grad_weights);
  }
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights};
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CPU, m) {
  m.impl("ms_deform_attn", ms_deform_attn);
  m.impl("ms_deform_attn_backward", ms_deform_attn_backward);
}

} // namespace dn_detr
