// Deformable attention on the CPU: vectorised over channels, threaded over queries (forward) or
// over disjoint parts of grad_value (backward), deterministic.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../ms_deform_attn.h"

namespace dn_detr {
namespace {

template <typename T, typename S>
struct Inputs {
  const S* value;
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
#include "simd.h"
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
#include "simd.h"
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
#include "simd.h"
#include "ms_deform_attn_kernels.h"
#undef VECTOR_BYTES
} // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

template <typename T, typename S>
struct Kernels {
  decltype(&portable::forward<T, S>) forward = portable::forward<T, S>;
  decltype(&portable::backward<T, S>) backward = portable::backward<T, S>;
};

// ATEN_CPU_CAPABILITY chooses, as it does for PyTorch's own kernels.
template <typename T, typename S>
Kernels<T, S> kernels() {
#ifdef HAS_X86_KERNELS
  static const std::string capability = at::get_cpu_capability();
  if (capability.rfind("AVX512", 0) == 0) {
    return {avx512::forward<T, S>, avx512::backward<T, S>};
  }
  if (capability == "AVX2") {
    return {avx2::forward<T, S>, avx2::backward<T, S>};
  }
#endif
  return {};
}

// The inputs as the kernels want them: contiguous, float16 (which few CPUs widen) as float32.
struct Prepared {
  Prepared(
      const at::Tensor& value_,
      at::IntArrayRef spatial_shapes,
      const at::Tensor& locations_,
      const at::Tensor& weights_)
      : sizes(check_ms_deform_attn(value_, spatial_shapes, locations_, weights_)),
        value((value_.scalar_type() == at::kHalf ? value_.to(at::kFloat) : value_).contiguous()),
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
  const auto forward = kernels<T, S>().forward;
  const auto in = p.inputs<T, S>();
  T* out = output.mutable_data_ptr<T>();
  // A row is a few microseconds of work.
  at::parallel_for(0, p.sizes.batch * p.sizes.queries, 16, [&](int64_t begin, int64_t end) {
    forward(p.sizes, in, out, begin, end);
  });
}

template <typename T, typename S>
void run_backward(
    const Prepared& p,
    const at::Tensor& grad_output,
    const at::Tensor& grad_value,
    const at::Tensor& grad_locations,
    const at::Tensor& grad_weights) {
  const auto backward = kernels<T, S>().backward;
  const auto in = p.inputs<T, S>();
  const T* grad = grad_output.const_data_ptr<T>();
  const Gradients<T> out{grad_value.mutable_data_ptr<T>(), grad_locations.mutable_data_ptr<T>(),
                         grad_weights.mutable_data_ptr<T>()};
  // Levels of one head are done together (they share what is read) if that keeps all threads busy.
  const int64_t owners = p.sizes.batch * p.sizes.heads;
  const auto levels = static_cast<int64_t>(p.sizes.levels.size());
  const int64_t parts = owners % at::get_num_threads() == 0 ? 1 : std::max<int64_t>(1, levels);
  at::parallel_for(0, owners * parts, 1, [&](int64_t begin, int64_t end) {
    backward(p.sizes, in, grad, out, parts, begin, end);
  });
}

at::Tensor ms_deform_attn(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& locations,
    const at::Tensor& weights) {
  const Prepared p(value, spatial_shapes, locations, weights);
  const auto& z = p.sizes;
  auto output = at::empty({z.batch, z.queries, z.heads * z.channels}, locations.options());
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
  const auto grad = grad_output.to(locations.scalar_type()).contiguous();
  auto grad_value = at::zeros(value.sizes(), locations.options());
  auto grad_locations = at::empty(locations.sizes(), locations.options());
  auto grad_weights = at::empty(weights.sizes(), weights.options());
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
