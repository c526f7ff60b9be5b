// How the CPU kernels of deformable attention distribute work over threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "../ms_deform_attn.h"

namespace dn_detr {

// The order in which a task visits the queries. If queries are cells, as in encoders, tiles of
// 16 x 16: neighbours sample the same cells, which are then still in the cache.
inline std::vector<int32_t> order_of_queries(const Sizes& z) {
  constexpr int32_t side = 16;
  std::vector<int32_t> order(z.queries);
  if (z.queries != z.tokens) {
    std::iota(order.begin(), order.end(), 0);
    return order;
  }
  auto next = order.begin();
  for (const auto& level : z.levels) {
    for (int32_t top = 0; top < level.height; top += side) {
      for (int32_t left = 0; left < level.width; left += side) {
        for (int32_t y = top; y < std::min(top + side, level.height); ++y) {
          const int32_t width = std::min(side, level.width - left);
          std::iota(next, next + width, level.start + y * level.width + left);
          next += width;
        }
      }
    }
  }
  return order;
}

// Calls f(begin, end) on the B * Q rows.
template <typename F>
void for_rows(const Sizes& z, const F& f) {
  // A row is a few microseconds of work.
  at::parallel_for(0, z.batch * z.queries, 16, f);
}

// Whether there is at least one head for each thread.
inline bool has_heads_for_all_threads(const Sizes& z) {
  return z.batch * z.heads >= at::get_num_threads();
}

// Calls f(begin, end) on the B * H heads.
template <typename F>
void for_heads(const Sizes& z, const F& f) {
  at::parallel_for(0, z.batch * z.heads, 1, f);
}

// Calls f(parts, begin, end) on B * H * parts tasks, each of levels / parts levels of one head.
template <typename F>
void for_parts(const Sizes& z, const F& f) {
  // One task for all levels of a head, which share their reads, if that keeps all threads busy.
  const int64_t owners = z.batch * z.heads;
  const auto levels = static_cast<int64_t>(z.levels.size());
  const int64_t parts = owners % at::get_num_threads() == 0 ? 1 : std::max<int64_t>(1, levels);
  at::parallel_for(0, owners * parts, 1, [&](int64_t begin, int64_t end) {
    f(parts, begin, end);
  });
}

} // namespace dn_detr
