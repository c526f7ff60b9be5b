// Backward operator of the fused deformable attention on the GPU, with sums in floating point.

#include <ATen/Context.h>
#include <torch/library.h>

#include <tuple>

#include "deformable_attention_backward.cuh"

namespace dn_detr {

at::Tensor sum_in_floating_point(const DeformableBackward& call) {
  return sum_gradients(call, call.grad_weights.scalar_type(), [](const auto& sums, auto t) {
    using T = decltype(t);
    return FloatingSum<T>{sums.template mutable_data_ptr<T>()};
  });
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> deformable_attention_backward(
    const at::Tensor& grad_output_,
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& valid_sizes,
    const at::Tensor& reference,
    const at::Tensor& offsets,
    const at::Tensor& logits,
    const std::optional<at::Tensor>& padding,
    bool needs_reference) {
  const DeformableSizes sizes = check_deformable_attention(
      value, spatial_shapes, valid_sizes, reference, offsets, logits, padding);
  check_grad_output(grad_output_, value, sizes);
  const c10::cuda::CUDAGuard guard(value.device());
  const bool is_fixed = at::globalContext().deterministicAlgorithms();
  const auto options = reference.options();
  if (grad_output_.numel() == 0 || logits.numel() == 0) {
    return {at::zeros(value.sizes(), value.options()),
            needs_reference ? at::zeros(reference.sizes(), options) : at::empty({0}, options),
            at::zeros(offsets.sizes(), offsets.options()),
            at::zeros(logits.sizes(), logits.options())};
  }
  if (must_be_widened(value)) {
    auto [grad_value, grad_reference, grad_offsets, grad_logits] = deformable_attention_backward(
        grad_output_.to(at::kFloat), value.to(at::kFloat), spatial_shapes, valid_sizes, reference,
        offsets.to(at::kFloat), logits.to(at::kFloat), padding, needs_reference);
    return {grad_value.to(value.scalar_type()), grad_reference,
            grad_offsets.to(offsets.scalar_type()), grad_logits.to(offsets.scalar_type())};
  }
  const DeformableInputs inputs{
      aligned(value), aligned(valid_sizes), aligned(reference), aligned(offsets), aligned(logits),
      padding ? padding->contiguous() : at::Tensor()};
  const auto grad_output = aligned(grad_output_);
  const auto grad_offsets = empty_aligned(offsets.sizes(), offsets.options());
  const auto grad_logits = empty_aligned(logits.sizes(), logits.options());
  // The gradients of the weights are kept in full precision until those of the logits are computed.
  const auto grad_weights = logits.scalar_type() == reference.scalar_type()
      ? grad_logits
      : empty_aligned(logits.sizes(), options);
  const int64_t parts = sizes.reference_levels == 1 ? 1 : sizes.samples();
  const auto reference_parts = needs_reference
      ? empty_aligned({sizes.batch, sizes.queries, sizes.heads, parts, sizes.coordinates}, options)
      : at::Tensor();
  DeformableBackward call{
      sizes, inputs, grad_output, grad_offsets, grad_logits, grad_weights, reference_parts, {}};
  if (is_fixed) {
    // The weights of a query and head sum to 1, so it adds at most 1 * grad_output to a cell.
    const auto [least, most] = at::aminmax(grad_output);
    const auto largest = at::maximum(most, -least).to(at::kDouble) + 0 * logits.amax();
    call.scale = scale_of(largest, sizes.queries, reference.scalar_type());
  }
  const auto grad_value = is_fixed ? sum_in_fixed_point(call) : sum_in_floating_point(call);
  at::Tensor grad_reference = at::empty({0}, options);
  if (needs_reference) { // references of one level are 3-D or 4-D
    const int64_t levels = sizes.reference_levels;
    const auto parts_of_levels = reference_parts.unflatten(3, {levels, parts / levels});
    grad_reference = parts_of_levels.sum({2, 4}).view(reference.sizes());
  }
  return {grad_value, grad_reference, grad_offsets, grad_logits};
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CUDA, m) {
  m.impl("deformable_attention_backward", deformable_attention_backward);
}

} // namespace dn_detr
