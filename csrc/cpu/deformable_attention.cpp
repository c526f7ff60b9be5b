// deformable_attention on the CPU: the loops of ms_deform_attn with fused softmax, references and
// padding. Except for gradients, no tensor of the size of the samples is stored.

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
  const bool* const* padding; // of each image, null if it has none
};

template <typename T, typename O>
struct Gradients {
  T* reference; // null if not needed
  O* offsets;
  O* logits;
};

#define KERNELS "deformable_attention_kernels.h"
#include "instruction_sets.h"
#include "sampling_operators.h"

// Checked inputs as the kernels need them.
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
  with_types(p.value, p.offsets, [&](auto t, auto s, auto o) {
    using T = decltype(t);
    run_forward<T, decltype(s)>(z, p.inputs<T, decltype(o)>(), p.value, output);
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
  with_types(p.value, p.offsets, [&](auto t, auto s, auto o) {
    using T = decltype(t);
    using O = decltype(o);
    const Gradients<T, O> out{
        needs_reference ? grad_reference.mutable_data_ptr<T>() : nullptr,
        grad_offsets.mutable_data_ptr<O>(), grad_logits.mutable_data_ptr<O>()};
    run_backward<T, decltype(s)>(
        z, p.inputs<T, O>(), out, p.value, grad, grad_value, needs_reference);
  });
  return {grad_value.to(value.scalar_type()), grad_reference,
          grad_offsets.to(offsets.scalar_type()), grad_logits.to(logits.scalar_type())};
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CPU, m) {
  m.impl("deformable_attention", deformable_attention);
  m.impl("deformable_attention_backward", deformable_attention_backward);
}

} // namespace dn_detr
