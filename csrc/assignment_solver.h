// Linear assignment by shortest augmenting paths (Jonker and Volgenant, 1987), for CPU and CUDA:
// each row gets `capacity` columns of its own, at the least total cost.
//
// Rows are few and columns many. A column that is not taken has price 0, so only the cheapest open
// column of a row can end a path through that row; it is cached until it is taken. Paths therefore
// run only through taken columns, at most rows * capacity of them, and costs are read in full only
// once. Copies of a row (capacity > 1, H-DETR's one-to-many matching) are one node: a path that
// reaches a row reaches all its columns.
//
// Sums are float64 in a fixed order, and ties go to the lower index, so that the result does not
// depend on the number of threads or the device.
#pragma once

#include <cstdint>
#include <limits>

#include "host_device.h"

namespace dn_detr {

// A cost or the length of a path, and its column; index -1: none.
struct Candidate {
  double cost;
  int32_t index;
};

DN_DETR_HOST_DEVICE Candidate no_candidate() {
  return {std::numeric_limits<double>::infinity(), -1};
}

DN_DETR_HOST_DEVICE Candidate lesser(const Candidate& a, const Candidate& b) {
  if (a.index < 0 || b.index < 0) {
    return a.index < 0 ? b : a;
  }
  return b.cost < a.cost || (b.cost == a.cost && b.index < a.index) ? b : a;
}

// Workspace of one problem: arrays over rows, then over taken columns, all of size rows * capacity.
struct Workspace {
  static constexpr int64_t NUM_DOUBLES = 4, NUM_INTEGERS = 6; // arrays of each type

  double *row_price, *best_cost, *column_price, *distance;
  int32_t *best_column, *via; // cheapest open column; index of the taken column on the path
  int32_t *column, *owner, *previous, *is_scanned; // owner: row; previous: row before it

  // The part from `start` on of arrays of `size` elements.
  DN_DETR_HOST_DEVICE Workspace(double* doubles, int32_t* integers, int64_t size, int64_t start) {
    double** d[] = {&row_price, &best_cost, &column_price, &distance};
    for (int64_t i = 0; i < NUM_DOUBLES; ++i) {
      *d[i] = doubles + i * size + start;
    }
    int32_t** n[] = {&best_column, &via, &column, &owner, &previous, &is_scanned};
    for (int64_t i = 0; i < NUM_INTEGERS; ++i) {
      *n[i] = integers + i * size + start;
    }
  }
};

// Assigns one more column to `first_row`; `taken` columns have owners. Control flow is uniform: all
// threads of the team choose the same rows and stop together.
//
// Team: rank() of size() threads; in the first scan, lane() of lanes() threads handle a row of
// warp() of warps(); sync(); reductions least(), any() and least_of_warp(). Grid: at(row, column),
// is_open(column), close(column), scan(row, lane, lanes) -> the cheapest open column of a lane.
template <typename Team, typename Grid>
DN_DETR_HOST_DEVICE void augment(
    const Team& team,
    const Grid& grid,
    const Workspace& w,
    int32_t first_row,
    int32_t taken) {
  for (int32_t k = team.rank(); k < taken; k += team.size()) {
    w.distance[k] = std::numeric_limits<double>::infinity();
    w.is_scanned[k] = 0;
  }
  if (team.rank() == 0) {
    w.via[first_row] = -1;
  }
  int32_t row = first_row, last_row = -1;
  Candidate reached{0, -1}; // distance of the row, and the taken column before it
  Candidate end = no_candidate(); // open column at the end of the best path
  for (int32_t step = 0; step <= taken; ++step) {
    Candidate open{w.best_cost[row], w.best_column[row]};
    if (!grid.is_open(open.index)) {
      open = team.least(grid.scan(row, team.rank(), team.size()));
      if (team.rank() == 0) {
        w.best_cost[row] = open.cost;
        w.best_column[row] = open.index;
      }
    }
    const double so_far = reached.cost - w.row_price[row];
    if (end.index < 0 || so_far + open.cost < end.cost) {
      end = {so_far + open.cost, open.index};
      last_row = row;
    }
    Candidate nearest = no_candidate();
    for (int32_t k = team.rank(); k < taken; k += team.size()) {
      if (w.is_scanned[k]) {
        continue;
      }
      if (w.owner[k] == row) {
        w.distance[k] = reached.cost;
        w.is_scanned[k] = 1;
        continue;
      }
      const double length = so_far + grid.at(row, w.column[k]) - w.column_price[k];
      if (length < w.distance[k]) {
        w.distance[k] = length;
        w.previous[k] = row;
      }
      nearest = lesser(nearest, {w.distance[k], k});
    }
    reached = team.least(nearest);
    if (reached.index < 0 || !(reached.cost < end.cost)) {
      break;
    }
    row = w.owner[reached.index];
    if (team.rank() == 0) {
      w.via[row] = reached.index;
    }
  }
  team.sync();
  // Update prices: no pair costs less than the sum of its prices, pairs of the new path cost just
  // that.
  for (int32_t k = team.rank(); k < taken; k += team.size()) {
    if (w.is_scanned[k]) {
      const double rise = end.cost - w.distance[k];
      w.column_price[k] -= rise;
      if (w.via[w.owner[k]] == k) {
        w.row_price[w.owner[k]] += rise;
      }
    }
  }
  team.sync();
  if (team.rank() == 0) {
    w.row_price[first_row] += end.cost;
    w.column[taken] = end.index;
    w.column_price[taken] = 0;
    w.owner[taken] = last_row;
    for (row = last_row; row != first_row; row = w.owner[w.via[row]]) {
      w.owner[w.via[row]] = w.previous[w.via[row]];
    }
    grid.close(end.index);
  }
  team.sync();
}

// Solves one problem, which needs at least rows * capacity open columns: row w.owner[k] gets column
// w.column[k] for k < rows * capacity. Returns false in all threads, without a solution, if a cost
// of an open column is not finite; so it always terminates.
template <typename Team, typename Grid>
DN_DETR_HOST_DEVICE bool solve(
    const Team& team,
    const Grid& grid,
    const Workspace& w,
    int32_t rows,
    int32_t capacity) {
  bool is_bad = false;
  for (int32_t row = team.warp(); row < rows; row += team.warps()) {
    is_bad |= grid.has_bad_cost(row, team.lane(), team.lanes());
    const Candidate open = team.least_of_warp(grid.scan(row, team.lane(), team.lanes()));
    if (team.lane() == 0) {
      w.row_price[row] = 0;
      w.best_cost[row] = open.cost;
      w.best_column[row] = open.index;
    }
  }
  if (team.any(is_bad)) {
    return false;
  }
  for (int32_t taken = 0; taken < rows * capacity; ++taken) {
    augment(team, grid, w, taken % rows, taken);
  }
  return true;
}

} // namespace dn_detr
