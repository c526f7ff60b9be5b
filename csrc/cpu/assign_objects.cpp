// All assignment problems of a batch on the CPU, and the check for non-finite values.

#include <ATen/Dispatch.h>
#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "../assign_objects.h"
#include "../assignment_solver.h"
#include "matching_common.h"

namespace dn_detr {
namespace {

#define KERNELS "assign_objects_kernels.h"
#include "instruction_sets.h"

template <typename T>
struct Scans {
  decltype(&portable::cheapest<T>) cheapest = KERNEL_FOR_THIS_CPU(cheapest<T>);
  decltype(&portable::has_nonfinite<T>) has_nonfinite = KERNEL_FOR_THIS_CPU(has_nonfinite<T>);
};

// A team of one thread.
struct SingleThread {
  int32_t rank() const { return 0; }
  int32_t size() const { return 1; }
  int32_t lane() const { return 0; }
  int32_t lanes() const { return 1; }
  int32_t warp() const { return 0; }
  int32_t warps() const { return 1; }
  void sync() const {}
  Candidate least(const Candidate& own) const { return own; }
  Candidate least_of_warp(const Candidate& own) const { return own; }
  bool any(bool own) const { return own; }
};

// A matrix of costs; closed [columns]: 0, or infinity for columns that are taken or do not exist.
template <typename T>
struct Matrix {
  const T* cost;
  int64_t pitch; // from one row to the next
  T* closed;
  int32_t columns;
  bool has_empty; // some columns do not exist; their costs may be non-finite
  Scans<T> scans;

  T at(int32_t row, int32_t column) const { return cost[row * pitch + column]; }
  bool is_open(int32_t column) const { return closed[column] == 0; }
  void close(int32_t column) const { closed[column] = std::numeric_limits<T>::infinity(); }

  Candidate scan(int32_t row, int32_t, int32_t) const {
    const int32_t column = scans.cheapest(cost + row * pitch, closed, columns);
    return column < 0 ? no_candidate() : Candidate{at(row, column), column};
  }

  bool has_bad_cost(int32_t row, int32_t, int32_t) const {
    const T* numbers = cost + row * pitch;
    if (!scans.has_nonfinite(numbers, columns)) {
      return false;
    }
    bool is_bad = !has_empty;
    for (int32_t column = 0; column < columns; ++column) {
      is_bad |= is_open(column) && !std::isfinite(numbers[column]);
    }
    return is_bad;
  }
};

// Scratch memory of a thread, reused between problems.
template <typename T>
struct Scratch {
  std::vector<double> doubles;
  std::vector<int32_t> integers;
  std::vector<T> closed, matrix;
  std::vector<int32_t> open; // slots that exist

  Workspace workspace(int64_t size) {
    if (static_cast<int64_t>(integers.size()) < Workspace::NUM_INTEGERS * size) {
      doubles.resize(Workspace::NUM_DOUBLES * size);
      integers.resize(Workspace::NUM_INTEGERS * size);
    }
    return {doubles.data(), integers.data(), size, 0};
  }
};

// Solves one layer, image and group. cost: of its n objects; is_empty: null or of its slots.
template <typename T>
bool solve_group(
    const MatchSegment& segment,
    const T* cost,
    int32_t n,
    const bool* is_empty,
    const Scans<T>& scans,
    Scratch<T>& scratch,
    int64_t* object_of) {
  const auto slots = static_cast<int32_t>(segment.group_slots);
  const auto wanted = static_cast<int32_t>(n * segment.matches_per_object);
  const int64_t pitch = segment.cost.size(2);
  scratch.closed.assign(slots, T(0));
  scratch.open.clear();
  for (int32_t slot = 0; slot < slots && is_empty != nullptr; ++slot) {
    if (is_empty[slot]) {
      scratch.closed[slot] = std::numeric_limits<T>::infinity();
    } else {
      scratch.open.push_back(slot);
    }
  }
  const bool has_empty = is_empty != nullptr;
  const int32_t num_open = has_empty ? static_cast<int32_t>(scratch.open.size()) : slots;
  if (wanted <= num_open) { // rows are objects
    const Matrix<T> matrix{cost, pitch, scratch.closed.data(), slots, has_empty, scans};
    const Workspace w = scratch.workspace(wanted);
    if (!solve(SingleThread{}, matrix, w, n, static_cast<int32_t>(segment.matches_per_object))) {
      return false;
    }
    for (int32_t k = 0; k < wanted; ++k) {
      object_of[w.column[k]] = w.owner[k];
    }
    return true;
  }
  if (!has_empty) {
    scratch.open.resize(slots);
    std::iota(scratch.open.begin(), scratch.open.end(), 0);
  }
  // Rows are slots, columns copies of objects.
  scratch.matrix.resize(static_cast<size_t>(num_open) * wanted);
  for (int32_t row = 0; row < num_open; ++row) {
    for (int32_t column = 0; column < wanted; ++column) {
      scratch.matrix[static_cast<int64_t>(row) * wanted + column] =
          cost[column % n * pitch + scratch.open[row]];
    }
  }
  scratch.closed.assign(wanted, T(0));
  const Matrix<T> matrix{scratch.matrix.data(), wanted, scratch.closed.data(), wanted, false,
                         scans};
  const Workspace w = scratch.workspace(num_open);
  if (!solve(SingleThread{}, matrix, w, num_open, 1)) {
    return false;
  }
  for (int32_t k = 0; k < num_open; ++k) {
    object_of[scratch.open[w.owner[k]]] = w.column[k] % n;
  }
  return true;
}

template <typename T>
void solve_all(
    const std::vector<MatchSegment>& segments,
    const std::vector<int64_t>& first,
    int64_t batch) {
  std::vector<int64_t> ends; // of each segment's pairs of layer and image
  for (const MatchSegment& segment : segments) {
    ends.push_back((ends.empty() ? 0 : ends.back()) + segment.layers * batch);
  }
  const Scans<T> scans;
  parallel_for_dynamic(ends.empty() ? 0 : ends.back(), [&](int64_t i) {
    const int64_t s = std::upper_bound(ends.begin(), ends.end(), i) - ends.begin();
    const MatchSegment& segment = segments[s];
    const int64_t pair = i - (s == 0 ? 0 : ends[s - 1]), l = pair / batch, b = pair % batch;
    const int64_t slots = segment.cost.size(2), objects = segment.cost.size(1);
    const auto n = static_cast<int32_t>(first[b + 1] - first[b]);
    if (n == 0) {
      return;
    }
    static thread_local Scratch<T> scratch;
    const T* cost = segment.cost.const_data_ptr<T>() + (l * objects + first[b]) * slots;
    int64_t* object_of = segment.object_of.mutable_data_ptr<int64_t>() + pair * slots;
    const bool* is_empty =
        segment.is_empty ? segment.is_empty->const_data_ptr<bool>() + b * slots : nullptr;
    for (int64_t g = 0; g < segment.groups; ++g) {
      const int64_t start = g * segment.group_slots;
      if (!solve_group(
              segment, cost + start, n, is_empty ? is_empty + start : nullptr, scans, scratch,
              object_of + start)) {
        segment.is_bad.mutable_data_ptr<bool>()[pair] = true;
      }
    }
  });
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> assign_objects(
    at::TensorList costs,
    const at::Tensor& image_of,
    int64_t batch,
    const OptionalTensors& is_empty,
    at::IntArrayRef num_groups,
    at::IntArrayRef matches_per_object) {
  const auto segments =
      check_assign_objects(costs, image_of, batch, is_empty, num_groups, matches_per_object);
  const std::vector<int64_t> first = first_of_each_image(image_of, batch);
  if (!segments.empty()) {
    AT_DISPATCH_FLOATING_TYPES(costs[0].scalar_type(), "assign_objects", [&] {
      solve_all<scalar_t>(segments, first, batch);
    });
  }
  return results(segments);
}

at::Tensor has_nonfinite(const at::Tensor& values_, const std::optional<at::Tensor>& is_empty_) {
  check_has_nonfinite(values_, is_empty_);
  const int64_t batch = values_.size(1), slots = values_.size(2), width = values_.size(3);
  const bool is_flat = values_.stride(3) == 1 && values_.stride(2) == width;
  const auto values = is_flat ? values_ : values_.contiguous();
  const at::Tensor is_empty = is_empty_ ? is_empty_->contiguous() : at::Tensor();
  auto found = at::zeros({values.size(0), batch}, values.options().dtype(at::kBool));
  if (values.numel() == 0) { // whose strides may be absurd
    return found;
  }
  bool* to = found.mutable_data_ptr<bool>();
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "has_nonfinite", [&] {
    const auto has_nonfinite = Scans<scalar_t>().has_nonfinite;
    const scalar_t* from = values.const_data_ptr<scalar_t>();
    parallel_for_dynamic(values.size(0) * batch, [&](int64_t i) {
      const int64_t b = i % batch;
      const scalar_t* image = from + i / batch * values.stride(0) + b * values.stride(1);
      bool is_bad = has_nonfinite(image, slots * width);
      if (is_bad && is_empty.defined()) {
        const bool* skip = is_empty.const_data_ptr<bool>() + b * slots;
        is_bad = false;
        for (int64_t slot = 0; slot < slots && !is_bad; ++slot) {
          is_bad = !skip[slot] && has_nonfinite(image + slot * width, width);
        }
      }
      to[i] = is_bad;
    });
  });
  return found;
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CPU, m) {
  m.impl("assign_objects", assign_objects);
  m.impl("has_nonfinite", has_nonfinite);
}

} // namespace dn_detr
