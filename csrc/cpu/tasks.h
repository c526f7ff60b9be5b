// How the CPU's kernels of deformable attention share out their work, and how they take tensors.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "../ms_deform_attn.h"

namespace dn_detr {

// Contiguous; float16, which few CPUs widen, as float32.
inline at::Tensor without_half(const at::Tensor& x) {
  return (x.scalar_type() == at::kHalf ? x.to(at::kFloat) : x).contiguous();
}

// f(begin, end) on the B * Q rows.
template <typename F>
void for_rows(const Sizes& z, const F& f) {
  // A row is a few microseconds of work.
  at::parallel_for(0, z.batch * z.queries, 16, f);
}

// f(parts, begin, end) on B * H * parts tasks, each of levels / parts levels of one head.
template <typename F>
void for_parts(const Sizes& z, const F& f) {
  // Levels of one head are done together (they share what is read) if that keeps all threads busy.
  const int64_t owners = z.batch * z.heads;
  const auto levels = static_cast<int64_t>(z.levels.size());
  const int64_t parts = owners % at::get_num_threads() == 0 ? 1 : std::max<int64_t>(1, levels);
  at::parallel_for(0, owners * parts, 1, [&](int64_t begin, int64_t end) {
    f(parts, begin, end);
  });
}

} // namespace dn_detr
