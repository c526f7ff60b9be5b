// One assignment problem for a block of GPU threads: finds its objects and slots, solves it, and
// writes the result. Also runs on the host, with a team of one thread.
#pragma once

#include <cmath>
#include <cstdint>

#include "assignment_solver.h"

namespace dn_detr {

// All problems of one segment, in the order layer, image, group. T: all objects of the batch.
template <typename T>
struct ProblemSet {
  const T* cost; // [L, T, slots]
  const int64_t* image_of; // [T]
  const bool* is_empty; // [B, slots] or null
  int64_t* object_of; // [L, B, slots], -1
  bool* is_bad; // [L, B], false
  int32_t batch, objects, slots, groups, matches_per_object;
  // Scratch: arrays of the workspace, indices of open slots, bits of closed columns.
  double* doubles;
  int32_t *integers, *open_slots;
  uint32_t* closed;
  int64_t workspace; // size of each array: layers * groups * objects * matches_per_object

  DN_DETR_HOST_DEVICE int32_t group_slots() const { return slots / groups; }
  // Columns are slots, or copies of objects.
  DN_DETR_HOST_DEVICE int32_t words() const {
    const int32_t copies = objects * matches_per_object;
    return ((group_slots() > copies ? group_slots() : copies) + 31) / 32;
  }
};

// Costs of rows and columns. Rows are objects and columns slots; with more objects (or copies) than
// open slots, rows are open slots and columns copies of objects.
template <typename T>
struct BitGrid {
  const T* cost; // of the first object at the group's first slot
  int64_t pitch; // from one object to the next
  int32_t objects, columns;
  const int32_t* row_slots; // slot of each row, or null if rows are objects
  uint32_t* closed;

  DN_DETR_HOST_DEVICE T at(int32_t row, int32_t column) const {
    return row_slots == nullptr ? cost[row * pitch + column]
                                : cost[column % objects * pitch + row_slots[row]];
  }

  DN_DETR_HOST_DEVICE bool is_open(int32_t column) const {
    return (closed[column / 32] >> (column % 32) & 1) == 0;
  }

  DN_DETR_HOST_DEVICE void close(int32_t column) const {
    closed[column / 32] |= uint32_t(1) << (column % 32);
  }

  DN_DETR_HOST_DEVICE Candidate scan(int32_t row, int32_t lane, int32_t lanes) const {
    T least = std::numeric_limits<T>::infinity();
    int32_t found = -1;
#pragma unroll 8
    for (int32_t column = lane; column < columns; column += lanes) {
      const T own = at(row, column);
      if (own < least && is_open(column)) {
        least = own;
        found = column;
      }
    }
    return {static_cast<double>(least), found};
  }

  DN_DETR_HOST_DEVICE bool has_bad_cost(int32_t row, int32_t lane, int32_t lanes) const {
    bool is_bad = false;
#pragma unroll 8
    for (int32_t column = lane; column < columns; column += lanes) {
      const T own = at(row, column);
      is_bad |= !(own - own == 0) && is_open(column);
    }
    return is_bad;
  }
};

// Bits of 32 slots from `first`: 1 = closed, because empty or beyond the end of the group.
DN_DETR_HOST_DEVICE uint32_t closed_bits(const bool* is_empty, int32_t first, int32_t slots) {
  uint32_t bits = 0;
  for (int32_t i = 0; i < 32; ++i) {
    const bool is_closed =
        first + i >= slots || (is_empty != nullptr && is_empty[first + i]);
    bits |= static_cast<uint32_t>(is_closed) << i;
  }
  return bits;
}

DN_DETR_HOST_DEVICE int32_t count_open(uint32_t bits) {
  int32_t count = 32;
  for (; bits != 0; bits &= bits - 1) {
    --count;
  }
  return count;
}

// problem: index over layers, images and groups. The team also needs sum().
template <typename Team, typename T>
DN_DETR_HOST_DEVICE void solve_problem(const Team& team, const ProblemSet<T>& p, int32_t problem) {
  const int32_t group = problem % p.groups, pair = problem / p.groups;
  const int32_t image = pair % p.batch, layer = pair / p.batch;
  int32_t first = 0, n = 0;
  for (int32_t t = team.rank(); t < p.objects; t += team.size()) {
    first += p.image_of[t] < image;
    n += p.image_of[t] == image;
  }
  first = team.sum(first);
  n = team.sum(n);
  if (n == 0) {
    return;
  }
  const int32_t slots = p.group_slots(), first_slot = group * slots;
  const bool* is_empty =
      p.is_empty == nullptr ? nullptr
                            : p.is_empty + static_cast<int64_t>(image) * p.slots + first_slot;
  uint32_t* closed = p.closed + static_cast<int64_t>(problem) * p.words();
  int32_t open = 0;
  for (int32_t word = team.rank(); word * 32 < slots; word += team.size()) {
    closed[word] = closed_bits(is_empty, word * 32, slots);
    open += count_open(closed[word]);
  }
  open = team.sum(open); // also a barrier: all threads see all bits

  // Scratch of this problem: one element for each copy of an object.
  const int64_t start =
      (static_cast<int64_t>(layer * p.groups + group) * p.objects + first) * p.matches_per_object;
  const Workspace w(p.doubles, p.integers, p.workspace, start);
  const int32_t copies = n * p.matches_per_object;
  BitGrid<T> grid{
      p.cost + (static_cast<int64_t>(layer) * p.objects + first) * p.slots + first_slot,
      p.slots, n, slots, nullptr, closed};
  int32_t rows = n, capacity = p.matches_per_object;
  if (copies > open) {
    int32_t* open_slots = p.open_slots + start;
    if (team.rank() == 0) {
      for (int32_t slot = 0, row = 0; slot < slots; ++slot) {
        if (grid.is_open(slot)) {
          open_slots[row++] = slot;
        }
      }
    }
    team.sync();
    for (int32_t word = team.rank(); word * 32 < copies; word += team.size()) {
      closed[word] = closed_bits(nullptr, word * 32, copies);
    }
    grid.row_slots = open_slots;
    grid.columns = copies;
    rows = open;
    capacity = 1;
    team.sync();
  }
  if (!solve(team, grid, w, rows, capacity)) {
    if (team.rank() == 0) {
      p.is_bad[pair] = true;
    }
    return;
  }
  int64_t* object_of = p.object_of + static_cast<int64_t>(pair) * p.slots + first_slot;
  for (int32_t k = team.rank(); k < rows * capacity; k += team.size()) {
    const bool is_object = grid.row_slots == nullptr;
    const int32_t slot = is_object ? w.column[k] : grid.row_slots[w.owner[k]];
    object_of[slot] = is_object ? w.owner[k] : w.column[k] % n;
  }
}

} // namespace dn_detr
