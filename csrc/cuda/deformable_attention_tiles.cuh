// Which block of threads does which queries and heads of the fused deformable attention.
//
// The queries of a block lie beside each other in the image, so that they read the same cells, from
// the L1 cache. Where the queries are the cells (encoder), a block is a tile of a level, for a few
// heads; else (decoder) all queries are one row, as they come. The order of queries changes no
// result.
#pragma once

#include <ATen/cuda/CUDAContextLight.h>

#include "ms_deform_attn.cuh"

namespace dn_detr {

// A level whose cells are queries, or the row of all queries.
struct Field {
  int32_t height, width, start; // start: its first query
  int32_t first_tile, columns; // columns of tiles
};

// Sizes of a tile and of its heads are powers of two.
struct Order {
  int32_t fields, tiles, threads;
  int32_t log_width, log_height, log_heads;
  Field field[MAX_LEVELS];

  dim3 grid(const Geometry& g) const {
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

// The largest power of two that divides heads, at most 2^most: log2 of it.
inline int32_t log_heads_of_block(int64_t heads, int32_t most) {
  int32_t log = 0;
  while (log < most && heads % (int64_t{2} << log) == 0) {
    ++log;
  }
  return log;
}

// For groups of `lanes` threads, and rows of `row_bytes` of a cell and head. Tiles are for the cache:
// as many heads as fill its lines of 128 bytes, and else as many queries as a block can hold. A
// decoder has few queries, and small blocks spread them over the GPU.
inline Order order_of(const Geometry& g, int lanes, int64_t row_bytes, int most_threads) {
  Order order{};
  const bool is_tiled = g.queries == g.tokens;
  order.threads = most_threads;
  if (!is_tiled) {
    const int64_t all = static_cast<int64_t>(g.batch) * g.queries * g.heads * lanes;
    const int64_t wanted = 4 * at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
    order.threads = std::min(most_threads, 256);
    while (order.threads > 64 && all / order.threads < wanted) {
      order.threads /= 2;
    }
  }
  const int32_t log_groups = floor_log2(order.threads / lanes);
  const int32_t most_heads = is_tiled ? floor_log2(std::max<int64_t>(128 / row_bytes, 1)) : 31;
  order.log_heads = log_heads_of_block(g.heads, std::min(log_groups, most_heads));
  const int32_t log_cells = log_groups - order.log_heads;
  order.log_width = is_tiled ? (log_cells + 1) / 2 : log_cells;
  order.log_height = log_cells - order.log_width;
  order.fields = is_tiled ? g.levels : 1;
  for (int32_t i = 0; i < order.fields; ++i) {
    Field& field = order.field[i];
    field = is_tiled ? Field{g.level[i].height, g.level[i].width, g.level[i].start, 0, 0}
                     : Field{1, g.queries, 0, 0, 0};
    field.first_tile = order.tiles;
    field.columns = (field.width + (1 << order.log_width) - 1) >> order.log_width;
    order.tiles += field.columns * ((field.height + (1 << order.log_height) - 1) >> order.log_height);
  }
  return order;
}

// The query and head of a group of lanes. Groups beyond the end of a tile stay, as all lanes of a
// warp do, but exist not: they read nothing that is not there, and write nothing.
struct Spot {
  int32_t query, head;
  bool exists;
};

template <int LANES>
__device__ __forceinline__ Spot find_spot(const Order& order) {
  const int32_t tile = blockIdx.x, group = threadIdx.x / LANES, cell = group >> order.log_heads;
  int32_t i = 0;
  while (i + 1 < order.fields && tile >= order.field[i + 1].first_tile) {
    ++i;
  }
  const Field field = order.field[i];
  const int32_t row = (tile - field.first_tile) / field.columns;
  const int32_t column = tile - field.first_tile - row * field.columns;
  const int32_t y = (row << order.log_height) + (cell >> order.log_width);
  const int32_t x = (column << order.log_width) + (cell & ((1 << order.log_width) - 1));
  Spot spot;
  spot.head = (blockIdx.y << order.log_heads) + (group & ((1 << order.log_heads) - 1));
  spot.exists = x < field.width && y < field.height;
  spot.query = field.start + min(y, field.height - 1) * field.width + min(x, field.width - 1);
  return spot;
}

} // namespace dn_detr
