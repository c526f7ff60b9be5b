// The assignment problem by shortest augmenting paths (Jonker and Volgenant, 1987), common to the
// CPU and CUDA: rows take columns at the least total cost, each row `capacity` columns of its own.
//
// It exploits that rows are few and columns many. A column that no row has taken yet has price 0,
// so only the cheapest open column of a row can end a path through it; that one is remembered until
// it is taken. Paths therefore run through the taken columns alone, at most rows * capacity of
// them, and the costs are read in full only once. Copies of a row (capacity > 1, H-DETR's matches_per_object)
// are one node: whoever reaches a row reaches all its columns.
//
// Sums are float64 in one fixed order, and ties go to the lower index, so that the answer is the
// same with any number of threads and on any device.
#pragma once

#include <cstdint>
#include <limits>

#include "host_device.h"

namespace dn_detr {

// A cost or a path's length, and where it is found; index -1: nowhere.
struct Candidate {
  double cost;
  int32_t index;
};

DN_DETR_ANYWHERE Candidate nowhere() {
  return {std::numeric_limits<double>::infinity(), -1};
}

DN_DETR_ANYWHERE Candidate lesser(const Candidate& a, const Candidate& b) {
  if (a.index < 0 || b.index < 0) {
    return a.index < 0 ? b : a;
  }
  return b.cost < a.cost || (b.cost == a.cost && b.index < a.index) ? b : a;
}

// Scratch of one problem. Arrays of rows, then of taken columns; all of size rows * capacity.
struct Workspace {
  static constexpr int64_t NUM_DOUBLES = 4, NUM_INTEGERS = 6; // arrays of each type

  double *row_price, *best_cost, *column_price, *distance;
  int32_t *best_column, *via; // cheapest open column; number of the taken column on the path
  int32_t *column, *owner, *previous, *is_scanned; // owner: row; previous: row before on the path

  // The part that starts at `start` of arrays of `size`.
  DN_DETR_ANYWHERE Workspace(double* doubles, int32_t* integers, int64_t size, int64_t start) {
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

// Gives `row` one more column; `taken` columns have owners. What all threads of the team decide
// together (which row, when to stop) is the same in each of them.
//
// Team: rank() of size() threads, of which lane() of lanes() work on one row of warp() of warps();
// sync(); least(), any() over the team and least_of_warp(). Grid: at(row, column), is_open(column),
// close(column), scan(row, lane, lanes) -> the cheapest of a lane's share of the open columns.
template <typename Team, typename Grid>
DN_DETR_ANYWHERE void augment(
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
  Candidate reached{0, -1}; // the row's distance, and the taken column that led to it
  Candidate end = nowhere(); // the open column where the best path ends
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
    Candidate nearest = nowhere();
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
  // Prices move so that no pair is cheaper than its prices and the pairs of the new path are equal.
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

// Solves one problem; there must be at least rows * capacity open columns. Then w.owner[k] has
// w.column[k] for k < rows * capacity. Returns false, in all threads, and solves nothing if a cost
// of an open column is not finite: so it ends whatever the costs are.
template <typename Team, typename Grid>
DN_DETR_ANYWHERE bool solve(
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
