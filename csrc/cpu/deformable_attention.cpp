// deformable_attention on the CPU: the loops of ms_deform_attn with softmax, references and padding
// inside of them. Nothing of the size of the samples is stored but their gradients.

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
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../deformable_attention.h"
#include "tasks.h"

namespace dn_detr {
namespace {

template <typename T, typename O>
struct Inputs {
  const T* valid_sizes;
  const T* reference;
  const O* offsets;
  const O* logits;
  const bool* const* padding; // of each image, null where it has none
};

template <typename T, typename O>
struct Gradients {
  T* reference; // null where it is not asked for
  O* offsets;
  O* logits;
};

#define KERNELS "deformable_attention_kernels.h"
#include "instruction_sets.h"

// The inputs as the kernels want them: contiguous, float16 (which few CPUs widen) as float32.
struct Prepared {
  Prepared(
      const at::Tensor& value_,
      at::IntArrayRef spatial_shapes,
      const at::Tensor& valid_sizes_,
      const at::Tensor& reference_,
      const at::Tensor& offsets_,
      const at::Tensor& logits_,
      const std::optional<at::Tensor>& padding_)
      : sizes(check_deformable_attention(
            value_, spatial_shapes, valid_sizes_, reference_, offsets_, logits_, padding_)),
        value(without_half(value_)),
        valid_sizes(valid_sizes_.contiguous()),
        reference(reference_.contiguous()),
        offsets(without_half(offsets_)),
        logits(without_half(logits_)),
        padding_of_images(sizes.batch, nullptr) {
    if (padding_) {
      padding = padding_->contiguous();
      for (int64_t image = 0; image < sizes.batch; ++image) {
        const bool* first = padding.const_data_ptr<bool>() + image * sizes.tokens;
        if (std::find(first, first + sizes.tokens, true) != first + sizes.tokens) {
          padding_of_images[image] = first;
        }
      }
    }
  }

  template <typename T, typename O>
  Inputs<T, O> inputs() const {
    return {valid_sizes.const_data_ptr<T>(), reference.const_data_ptr<T>(),
            offsets.const_data_ptr<O>(), logits.const_data_ptr<O>(), padding_of_images.data()};
  }

  DeformableSizes sizes;
  at::Tensor value, valid_sizes, reference, offsets, logits, padding;
  std::vector<const bool*> padding_of_images;
};

// Calls f with a number of each type: that of the computation, of the value and of the offsets.
template <typename F>
void with_types(const Prepared& p, const F& f) {
  if (p.value.scalar_type() == at::kDouble) {
    f(double(), double(), double());
  } else if (p.value.scalar_type() == at::kFloat) {
    f(float(), float(), float());
  } else if (p.offsets.scalar_type() == at::kFloat) {
    f(float(), at::BFloat16(), float());
  } else {
    f(float(), at::BFloat16(), at::BFloat16());
  }
}

at::Tensor deformable_attention(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& valid_sizes,
    const at::Tensor& reference,
    const at::Tensor& offsets,
    const at::Tensor& logits,
    const std::optional<at::Tensor>& padding) {
  const Prepared p(value, spatial_shapes, valid_sizes, reference, offsets, logits, padding);
  const auto& z = p.sizes;
  auto output = at::empty({z.batch, z.queries, z.heads * z.channels}, p.value.options());
  with_types(p, [&](auto t, auto s, auto o) {
    using T = decltype(t);
    using S = decltype(s);
    using O = decltype(o);
    const auto kernel = KERNEL_FOR_THIS_CPU(forward<T, S, O>);
    const auto in = p.inputs<T, O>();
    const S* from = p.value.const_data_ptr<S>();
    S* to = output.mutable_data_ptr<S>();
    for_rows(z, [&](int64_t begin, int64_t end) { kernel(z, in, from, to, begin, end); });
  });
  return output.to(value.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> deformable_attention_backward(
    const at::Tensor& grad_output,
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& valid_sizes,
    const at::Tensor& reference,
    const at::Tensor& offsets,
    const at::Tensor& logits,
    const std::optional<at::Tensor>& padding,
    bool needs_reference) {
  const Prepared p(value, spatial_shapes, valid_sizes, reference, offsets, logits, padding);
  const auto& z = p.sizes;
  check_grad_output(grad_output, value, z);
  const auto grad = without_half(grad_output);
  auto grad_value = at::empty_like(p.value);
  auto grad_reference =
      needs_reference ? at::empty_like(p.reference) : at::empty({0}, reference.options());
  auto grad_offsets = at::empty_like(p.offsets), grad_logits = at::empty_like(p.logits);
  with_types(p, [&](auto t, auto s, auto o) {
    using T = decltype(t);
    using S = decltype(s);
    using O = decltype(o);
    const auto in = p.inputs<T, O>();
    const S* from = p.value.const_data_ptr<S>();
    const S* grad_from = grad.const_data_ptr<S>();
    const Gradients<T, O> out{
        needs_reference ? grad_reference.mutable_data_ptr<T>() : nullptr,
        grad_offsets.mutable_data_ptr<O>(), grad_logits.mutable_data_ptr<O>()};
    S* to = grad_value.mutable_data_ptr<S>();
    const auto order = order_of_queries(z);
    if (has_heads_for_all_threads(z) && !needs_reference) {
      const auto backward = KERNEL_FOR_THIS_CPU(backward<T, S, O>);
      for_heads(z, [&](int64_t begin, int64_t end) {
        backward(z, in, from, grad_from, to, out, order.data(), begin, end);
      });
      return;
    }
    const auto differentiate = KERNEL_FOR_THIS_CPU(differentiate<T, S, O>);
    const auto scatter = KERNEL_FOR_THIS_CPU(scatter<T, S, O>);
    for_rows(z, [&](int64_t begin, int64_t end) {
      differentiate(z, in, from, grad_from, out, begin, end);
    });
    for_parts(z, [&](int64_t parts, int64_t begin, int64_t end) {
      scatter(z, in, grad_from, to, order.data(), parts, begin, end);
    });
  });
  return {grad_value.to(value.scalar_type()), grad_reference, grad_offsets.to(offsets.scalar_type()),
          grad_logits.to(logits.scalar_type())};
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CPU, m) {
  m.impl("deformable_attention", deformable_attention);
  m.impl("deformable_attention_backward", deformable_attention_backward);
}

} // namespace dn_detr
