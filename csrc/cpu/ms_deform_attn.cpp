// Deformable attention on the CPU: vectorised over channels, threaded over queries (forward) or over
// disjoint parts of grad_value (backward), deterministic.

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "../ms_deform_attn.h"

#if defined(__GNUC__) && !defined(__clang__)
#define IVDEP _Pragma("GCC ivdep")
#else
#define IVDEP
#endif

namespace dn_detr {
namespace {

template <typename T>
struct Inputs {
  const T* value;
  const T* locations;
  const T* weights;
};

template <typename T>
struct Gradients {
  T* value;
  T* locations;
  T* weights;
};

namespace portable {
#if defined(__GNUC__)
#define VECTOR_BYTES 16
#endif
#include "ms_deform_attn_kernels.h"
#undef VECTOR_BYTES
} // namespace portable

#if defined(__GNUC__) && defined(__x86_64__)
#define HAS_X86_KERNELS
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define VECTOR_BYTES 32
#include "ms_deform_attn_kernels.h"
#undef VECTOR_BYTES
} // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#endif
namespace avx512 {
#define VECTOR_BYTES 64
#include "ms_deform_attn_kernels.h"
#undef VECTOR_BYTES
} // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

template <typename T>
struct Kernels {
  decltype(&portable::forward<T>) forward = portable::forward<T>;
  decltype(&portable::backward<T>) backward = portable::backward<T>;
};

// ATEN_CPU_CAPABILITY chooses, as it does for PyTorch's own kernels.
template <typename T>
Kernels<T> kernels() {
#ifdef HAS_X86_KERNELS
  static const std::string capability = at::get_cpu_capability();
  if (capability.rfind("AVX512", 0) == 0) {
    return {avx512::forward<T>, avx512::backward<T>};
  }
  if (capability == "AVX2") {
    return {avx2::forward<T>, avx2::backward<T>};
  }
#endif
  return {};
}

template <typename T>
void run_forward(
    const Sizes& sizes,
    const at::Tensor& value,
    const at::Tensor& locations,
    const at::Tensor& weights,
    const at::Tensor& output) {
  const auto forward = kernels<T>().forward;
  const Inputs<T> in{value.const_data_ptr<T>(), locations.const_data_ptr<T>(),
                     weights.const_data_ptr<T>()};
  T* out = output.mutable_data_ptr<T>();
  // A row is a few microseconds of work.
  at::parallel_for(0, sizes.batch * sizes.queries, 16, [&](int64_t begin, int64_t end) {
    forward(sizes, in, out, begin, end);
  });
}

template <typename T>
void run_backward(
    const Sizes& sizes,
    const at::Tensor& grad_output,
    const at::Tensor& value,
    const at::Tensor& locations,
    const at::Tensor& weights,
    const at::Tensor& grad_value,
    const at::Tensor& grad_locations,
    const at::Tensor& grad_weights) {
  const auto backward = kernels<T>().backward;
  const Inputs<T> in{value.const_data_ptr<T>(), locations.const_data_ptr<T>(),
                     weights.const_data_ptr<T>()};
  const Gradients<T> out{grad_value.mutable_data_ptr<T>(), grad_locations.mutable_data_ptr<T>(),
                         grad_weights.mutable_data_ptr<T>()};
  const T* grad = grad_output.const_data_ptr<T>();
  const auto tasks = sizes.batch * static_cast<int64_t>(sizes.levels.size()) * sizes.heads;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    backward(sizes, in, grad, out, begin, end);
  });
}

at::Tensor ms_deform_attn(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& locations,
    const at::Tensor& weights) {
  const Sizes sizes = check_ms_deform_attn(value, spatial_shapes, locations, weights);
  const auto dtype = compute_type(value);
  auto output =
      at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, value.options().dtype(dtype));
  const auto precise = value.to(dtype).contiguous();
  const auto where = locations.contiguous(), attention = weights.contiguous();
  if (dtype == at::kDouble) {
    run_forward<double>(sizes, precise, where, attention, output);
  } else {
    run_forward<float>(sizes, precise, where, attention, output);
  }
  return output.to(value.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(
    const at::Tensor& grad_output,
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& locations,
    const at::Tensor& weights) {
  const Sizes sizes = check_ms_deform_attn(value, spatial_shapes, locations, weights);
  check_grad_output(grad_output, value, sizes);
  const auto dtype = compute_type(value);
  auto grad_value = at::zeros(value.sizes(), value.options().dtype(dtype));
  auto grad_locations = at::empty(locations.sizes(), locations.options());
  auto grad_weights = at::empty(weights.sizes(), weights.options());
  const auto precise = value.to(dtype).contiguous(), grad = grad_output.to(dtype).contiguous();
  const auto where = locations.contiguous(), attention = weights.contiguous();
  const auto run = dtype == at::kDouble ? run_backward<double> : run_backward<float>;
  run(sizes, grad, precise, where, attention, grad_value, grad_locations, grad_weights);
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights};
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CPU, m) {
  m.impl("ms_deform_attn", ms_deform_attn);
  m.impl("ms_deform_attn_backward", ms_deform_attn_backward);
}

} // namespace dn_detr
