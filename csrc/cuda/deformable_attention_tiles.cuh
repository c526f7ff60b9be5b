// Assignment of queries and heads to thread blocks, for the fused deformable attention.
//
// The queries of a block are neighbours in the image, so that their samples hit the same cells in
// the L1 cache. In an encoder, where queries are cells, a block is a tile of a level, for a few
// heads. In a decoder, the queries form one row, in their order. The schedule does not change
// results.
#pragma once

#include <ATen/cuda/CUDAContextLight.h>

#include "ms_deform_attn.cuh"

namespace dn_detr {

// The tiles of one level whose cells are queries, or of the row of all queries.
struct TileGrid {
  int32_t height, width, start; // start: first query
  int32_t first_tile, columns; // columns of tiles
};

// Tile sizes and heads of a block are powers of two.
struct TileSchedule {
  int32_t num_grids, tiles, threads;
  int32_t log_width, log_height, log_heads;
  TileGrid grids[MAX_LEVELS];

  dim3 launch_grid(const Geometry& g) const {
    const int32_t heads = ((g.heads - 1) >> log_heads) + 1;
    TORCH_CHECK_VALUE(heads <= 65535, "expected H below 65536, got ", g.heads);
    return dim3(tiles, heads, std::min(g.batch, 65535));
  }
};

inline int32_t floor_log2(int64_t x) {
  int32_t log = 0;
  while (x >> (log + 1)) {
    ++log;
  }
  return log;
}

// log2 of the largest power of two that divides heads, at most `most`.
inline int32_t log_heads_of_block(int64_t heads, int32_t most) {
  int32_t log = 0;
  while (log < most && heads % (int64_t{2} << log) == 0) {
    ++log;
  }
  return log;
}

// For groups of `lanes` threads; row_bytes: size of a cell and head. A tile has as many heads as
// fill a cache line of 128 bytes, and as many queries as then fit in a block. Decoders have few
// queries: smaller blocks spread them over the GPU.
inline TileSchedule make_schedule(
    const Geometry& g,
    int lanes,
    int64_t row_bytes,
    int most_threads) {
  TileSchedule schedule{};
  const bool is_tiled = g.queries == g.tokens;
  schedule.threads = most_threads;
  if (!is_tiled) {
    const int64_t all = static_cast<int64_t>(g.batch) * g.queries * g.heads * lanes;
    const int64_t wanted = 4 * at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
    schedule.threads = std::min(most_threads, 256);
    while (schedule.threads > 64 && all / schedule.threads < wanted) {
      schedule.threads /= 2;
    }
  }
  const int32_t log_groups = floor_log2(schedule.threads / lanes);
  const int32_t most_heads = is_tiled ? floor_log2(std::max<int64_t>(128 / row_bytes, 1)) : 31;
  schedule.log_heads = log_heads_of_block(g.heads, std::min(log_groups, most_heads));
  const int32_t log_cells = log_groups - schedule.log_heads;
  schedule.log_width = is_tiled ? (log_cells + 1) / 2 : log_cells;
  schedule.log_height = log_cells - schedule.log_width;
  schedule.num_grids = is_tiled ? g.levels : 1;
  for (int32_t i = 0; i < schedule.num_grids; ++i) {
    TileGrid& grid = schedule.grids[i];
    grid = is_tiled ? TileGrid{g.level[i].height, g.level[i].width, g.level[i].start, 0, 0}
                    : TileGrid{1, g.queries, 0, 0, 0};
    grid.first_tile = schedule.tiles;
    grid.columns = (grid.width + (1 << schedule.log_width) - 1) >> schedule.log_width;
    const int32_t rows = (grid.height + (1 << schedule.log_height) - 1) >> schedule.log_height;
    schedule.tiles += grid.columns * rows;
  }
  return schedule;
}

// The query and head of a group of lanes. Groups outside the tile's grid stay in the warp for
// shuffles but are inactive: they read only valid addresses and write nothing.
struct QuerySlot {
  int32_t query, head;
  bool is_active;
};

template <int LANES>
__device__ __forceinline__ QuerySlot find_query_slot(const TileSchedule& schedule) {
  const int32_t tile = blockIdx.x, group = threadIdx.x / LANES, cell = group >> schedule.log_heads;
  int32_t i = 0;
  while (i + 1 < schedule.num_grids && tile >= schedule.grids[i + 1].first_tile) {
    ++i;
  }
  const TileGrid grid = schedule.grids[i];
  const int32_t row = (tile - grid.first_tile) / grid.columns;
  const int32_t column = tile - grid.first_tile - row * grid.columns;
  const int32_t y = (row << schedule.log_height) + (cell >> schedule.log_width);
  const int32_t x = (column << schedule.log_width) + (cell & ((1 << schedule.log_width) - 1));
  QuerySlot slot;
  slot.head = (blockIdx.y << schedule.log_heads) + (group & ((1 << schedule.log_heads) - 1));
  slot.is_active = x < grid.width && y < grid.height;
  slot.query = grid.start + min(y, grid.height - 1) * grid.width + min(x, grid.width - 1);
  return slot;
}

} // namespace dn_detr
