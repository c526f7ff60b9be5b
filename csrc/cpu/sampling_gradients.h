// Gradients of sampling_kernels.h. No include guard: compiled once per instruction set, after it.
// For gradients, a source also has
//   source.store_head(samples, row, head)  stores the gradients of x, y and attention of a head
//   source.finish_query(samples, row)      called when all heads are stored
//   source.prefetch_head(row, head)        prefetches what load_head and store_head will need
//
// With at least as many heads as threads, each thread owns heads and computes all their gradients
// in one pass. With fewer, or if a gradient is a sum over heads, there are two passes: over rows,
// and over heads or their levels for the gradient of the value. The results are bit-identical.

// Adds to `dots` the products of the output's gradient and the corners' values.
template <typename T, typename V, int N, typename S>
inline void multiply_samples(Samples<T>& s, const S* value, int64_t stride, const S* grad_output) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  V grad[N];
  for (int v = 0; v < N; ++v) {
    load(grad[v], grad_output + v * lanes);
  }
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t row = s.token[i] * stride, down = s.columns[i] * stride;
    const int64_t rows[4] = {row, row + stride, row + down, row + down + stride};
    const auto corners = s.corners[i];
    V products[4] = {};
    if (corners == 15) {
      for (int v = 0; v < N; ++v) {
        for (int corner = 0; corner < 4; ++corner) {
          V a;
          load(a, value + rows[corner] + v * lanes);
          products[corner] += a * grad[v];
        }
      }
    } else {
      for (int corner = 0; corner < 4; ++corner) {
        for (int v = 0; v < (corners >> corner & 1 ? N : 0); ++v) {
          V a;
          load(a, value + rows[corner] + v * lanes);
          products[corner] += a * grad[v];
        }
      }
    }
    add_sums(&s.dots[4 * i], products);
  }
}

// Adds the weighted gradient of the output to the corners in grad_value, which starts at
// first_token.
template <typename T, typename V, int N, typename S>
inline void scatter_samples(
    const Samples<T>& s,
    const S* grad_output,
    int64_t first_token,
    int64_t stride,
    T* grad_value) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  V grad[N];
  for (int v = 0; v < N; ++v) {
    load(grad[v], grad_output + v * lanes);
  }
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t row = (s.token[i] - first_token) * stride, down = s.columns[i] * stride;
    const int64_t rows[4] = {row, row + stride, row + down, row + down + stride};
    const auto corners = s.corners[i];
    for (int corner = 0; corner < 4; ++corner) {
      if (corners >> corner & 1) {
        const T weight = s.weight[corner][i];
        T* to = grad_value + rows[corner];
        for (int v = 0; v < N; ++v) {
          V g;
          load(g, to + v * lanes);
          g += grad[v] * weight;
          store(to + v * lanes, g);
        }
      }
    }
  }
}

// Both at once, for cells stored as their value followed by its gradient, `channels` values each.
template <typename T, typename V, int N, typename S>
inline void multiply_and_scatter_samples(
    Samples<T>& s,
    T* cells,
    int64_t channels,
    const S* grad_output) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  V grad[N];
  for (int v = 0; v < N; ++v) {
    load(grad[v], grad_output + v * lanes);
  }
  const int64_t stride = 2 * channels;
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t row = s.token[i] * stride, down = s.columns[i] * stride;
    const int64_t rows[4] = {row, row + stride, row + down, row + down + stride};
    // Read before any store, which could alias them as far as the compiler knows.
    const T weights[4] = {s.weight[0][i], s.weight[1][i], s.weight[2][i], s.weight[3][i]};
    const auto corners = s.corners[i];
    V products[4] = {};
    const auto visit = [&](int corner) {
      T* cell = cells + rows[corner];
      for (int v = 0; v < N; ++v) {
        T* value = cell + v * lanes;
        V a, g;
        load(a, value);
        load(g, value + channels);
        products[corner] += a * grad[v];
        g += grad[v] * weights[corner];
        store(value + channels, g);
      }
    };
    if (corners == 15) {
      visit(0);
      visit(1);
      visit(2);
      visit(3);
    } else {
      for (int corner = 0; corner < 4; ++corner) {
        if (corners >> corner & 1) {
          visit(corner);
        }
      }
    }
    add_sums(&s.dots[4 * i], products);
  }
}

template <typename T, typename S>
struct MultiplySamples {
  Samples<T>& samples;
  const S* value;
  int64_t stride;
  const S* grad_output;

  template <typename V, int N>
  inline void run(int64_t c) const {
    multiply_samples<T, V, N>(samples, value + c, stride, grad_output + c);
  }
};

template <typename T, typename S>
struct ScatterSamples {
  const Samples<T>& samples;
  const S* grad_output;
  int64_t first_token, stride;
  T* grad_value;

  template <typename V, int N>
  inline void run(int64_t c) const {
    scatter_samples<T, V, N>(samples, grad_output + c, first_token, stride, grad_value + c);
  }
};

template <typename T, typename S>
struct MultiplyAndScatterSamples {
  Samples<T>& samples;
  T* cells;
  int64_t channels;
  const S* grad_output;

  template <typename V, int N>
  inline void run(int64_t c) const {
    multiply_and_scatter_samples<T, V, N>(samples, cells + c, channels, grad_output + c);
  }
};

// Gradients of all inputs but the value, for rows [begin, end) of B * Q.
template <typename T, typename S, typename Source>
void differentiate_rows(
    const Sizes& z,
    Source source,
    const S* value,
    const S* grad_output,
    int64_t begin,
    int64_t end) {
  const int64_t stride = z.heads * z.channels;
  Samples<T> samples(z, 0, z.levels.size());
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / z.queries;
    source.start_query(samples, row);
    for (int64_t head = 0; head < z.heads; ++head) {
      source.load_head(samples, row, head);
      samples.locate(source.padding_of(image));
      std::fill(samples.dots.begin(), samples.dots.end(), T(0));
      const int64_t channel = head * z.channels;
      for_channels<T>(
          z.channels,
          MultiplySamples<T, S>{samples, value + image * z.tokens * stride + channel, stride,
                                grad_output + row * stride + channel});
      samples.differentiate();
      source.store_head(samples, row, head);
    }
    source.finish_query(samples, row);
  }
}

// Gradient of the value, for tasks [begin, end) of B * H * parts, where a part is levels / parts
// levels. A task owns its head and levels of grad_value and scans all queries in the given order:
// no atomics, and the same result for any number of parts and threads. It accumulates in a buffer
// where the tokens of its head are contiguous, for locality in the cache.
template <typename T, typename S, typename Source>
void scatter_parts(
    const Sizes& z,
    Source source,
    const S* grad_output,
    S* grad_value,
    const int32_t* order,
    int64_t parts,
    int64_t begin,
    int64_t end) {
  const int64_t stride = z.heads * z.channels;
  const int64_t part_levels = static_cast<int64_t>(z.levels.size()) / parts;
  std::vector<T> buffer;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % parts, head = task / parts % z.heads;
    const int64_t image = task / parts / z.heads, channel = head * z.channels;
    Samples<T> samples(z, part * part_levels, (part + 1) * part_levels);
    const int64_t first_token = z.first_token(samples.first_level);
    const int64_t tokens = z.first_token(samples.last_level) - first_token;
    buffer.assign(tokens * z.channels, T(0));
    for (int64_t i = 0; i < z.queries; ++i) {
      const int64_t row = image * z.queries + order[i];
      source.start_query(samples, row);
      source.load_head(samples, row, head);
      samples.locate(source.padding_of(image));
      for_channels<T>(
          z.channels,
          ScatterSamples<T, S>{samples, grad_output + row * stride + channel, first_token,
                               z.channels, buffer.data()});
    }
    S* to = grad_value + (image * z.tokens + first_token) * stride + channel;
    for (int64_t token = 0; token < tokens; ++token) {
      std::copy_n(buffer.data() + token * z.channels, z.channels, to + token * stride);
    }
  }
}

// All gradients, for tasks [begin, end) of B * H. The buffer of a task holds the values of its
// head, each followed by its gradient.
template <typename T, typename S, typename Source>
void differentiate_heads(
    const Sizes& z,
    Source source,
    const S* value,
    const S* grad_output,
    S* grad_value,
    const int32_t* order,
    int64_t begin,
    int64_t end) {
  // Prefetch distance in queries: a task touches only one head of each row, an access pattern that
  // hardware prefetchers miss.
  constexpr int64_t ahead = 3;
  const int64_t stride = z.heads * z.channels;
  const std::unique_ptr<T[]> buffer(new T[2 * z.tokens * z.channels]);
  Samples<T> samples(z, 0, z.levels.size());
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / z.heads, head = task % z.heads, channel = head * z.channels;
    const int64_t first = image * z.tokens * stride + channel;
    for (int64_t token = 0; token < z.tokens; ++token) {
      T* cell = buffer.get() + 2 * token * z.channels;
      std::copy_n(value + first + token * stride, z.channels, cell);
      std::fill_n(cell + z.channels, z.channels, T(0));
    }
    for (int64_t i = 0; i < z.queries; ++i) {
      const int64_t row = image * z.queries + order[i];
      if (i + ahead < z.queries) {
        const int64_t later = image * z.queries + order[i + ahead];
        source.prefetch_head(later, head);
        prefetch(grad_output + later * stride + channel, z.channels);
      }
      source.start_query(samples, row);
      source.load_head(samples, row, head);
      samples.locate(source.padding_of(image));
      std::fill(samples.dots.begin(), samples.dots.end(), T(0));
      for_channels<T>(
          z.channels,
          MultiplyAndScatterSamples<T, S>{
              samples, buffer.get(), z.channels, grad_output + row * stride + channel});
      samples.differentiate();
      source.store_head(samples, row, head);
    }
    for (int64_t token = 0; token < z.tokens; ++token) {
      const T* cell = buffer.get() + 2 * token * z.channels;
      std::copy_n(cell + z.channels, z.channels, grad_value + first + token * stride);
    }
  }
}
