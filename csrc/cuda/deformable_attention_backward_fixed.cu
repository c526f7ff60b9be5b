// Deterministic backward of the fused deformable attention on the GPU: sums in fixed point.

#include "deformable_attention_backward.cuh"

namespace dn_detr {

at::Tensor sum_in_fixed_point(const DeformableBackward& call) {
  return sum_gradients(call, at::kLong, [&](const auto& sums, auto t) {
    using T = decltype(t);
    return FixedPointSum<T>{
        sums.template mutable_data_ptr<int64_t>(), call.scale.const_data_ptr<T>(), {}};
  });
}

} // namespace dn_detr
