// The loops that the operators of deformable attention share on the CPU. No include guard: compiled
// once per instruction set, after simd.h. T is the type that is computed with, S the one in which
// values are stored.
//
// What is sampled comes from a source, an operator's inputs:
//   source.start(samples, row)      the query: sets how `samples` turns its x and y into cells
//   source.put(samples, row, head)  x, y and attention of the samples of a head
// and where gradients are asked for:
//   source.take(samples, row, head) the gradients of those
//   source.finish(samples, row)     all heads are taken

// The samples of one query and head, on the levels [first_level, last_level).
template <typename T>
struct Samples {
  using V = typename Simd<T>::vector;
  using I = typename Simd<T>::integers;
  using Integer = typename Simd<T>::integer;

  Samples(const Sizes& z, int64_t first_level, int64_t last_level)
      : first_level(first_level),
        last_level(last_level),
        first(first_level * z.points),
        count((last_level - first_level) * z.points) {
    // The last vector may be partly beyond: its further samples are of a level without cells.
    const int64_t n = count + lanes_of<T>();
    for (auto* numbers :
         {&scale_x, &scale_y, &shift_x, &shift_y, &width, &height, &x, &y, &right, &below, &grad_x,
          &grad_y, &grad_attention, weight, weight + 1, weight + 2, weight + 3}) {
      numbers->resize(n);
    }
    dots.resize(4 * n);
    for (auto* integers : {&columns, &rows, &start, &token, &corners}) {
      integers->resize(n);
    }
    attention.resize(z.samples() + lanes_of<T>());
    for (int64_t i = 0; i < count; ++i) {
      const auto& level = z.levels[first_level + i / z.points];
      width[i] = static_cast<T>(level.width);
      height[i] = static_cast<T>(level.height);
      columns[i] = level.width;
      rows[i] = level.height;
      start[i] = level.start;
    }
  }

  // From x, y and attention to tokens, corners and weights. padding: of the image, or null.
  void locate(const bool* padding) {
    for (int64_t i = 0; i < count; i += lanes_of<T>()) {
      V px, py, factor_x, factor_y, term_x, term_y, w, h, a;
      I columns_, rows_, start_;
      load(px, &x[i]);
      load(py, &y[i]);
      load(factor_x, &scale_x[i]);
      load(factor_y, &scale_y[i]);
      load(term_x, &shift_x[i]);
      load(term_y, &shift_y[i]);
      load(w, &width[i]);
      load(h, &height[i]);
      load(a, &attention[first + i]);
      load(columns_, &columns[i]);
      load(rows_, &rows[i]);
      load(start_, &start[i]);
      px = px * factor_x + term_x;
      py = py * factor_y + term_y;
      // False for NaN. Only what lies inside is converted to an integer, so none overflows.
      const I is_inside = LESS(V{} - 1, px) & LESS(px, w) & LESS(V{} - 1, py) & LESS(py, h);
      px = WHERE(is_inside, px);
      py = WHERE(is_inside, py);
      I left = CONVERT(px, I), top = CONVERT(py, I);
      left += LESS(px, CONVERT(left, V)); // floor: the mask is -1
      top += LESS(py, CONVERT(top, V));
      px -= CONVERT(left, V);
      py -= CONVERT(top, V);
      const I in_columns = (LESS(I{} - 1, left) & 5) | (LESS(left + 1, columns_) & 10);
      const I in_rows = (LESS(I{} - 1, top) & 3) | (LESS(top + 1, rows_) & 12);
      const V lower = a * py, upper = a - lower;
      const V upper_right = upper * px, lower_right = lower * px;
      store(&corners[i], in_columns & in_rows & is_inside);
      store(&token[i], start_ + top * columns_ + left);
      store(&right[i], px);
      store(&below[i], py);
      store(&weight[0][i], upper - upper_right);
      store(&weight[1][i], upper_right);
      store(&weight[2][i], lower - lower_right);
      store(&weight[3][i], lower_right);
    }
    if (padding != nullptr) {
      hide(padding);
    }
  }

  // Takes away the corners that are padding.
  void hide(const bool* padding) {
    for (int64_t i = 0; i < count; ++i) {
      for (int corner = 0; corner < 4; ++corner) {
        if (corners[i] >> corner & 1) {
          const int64_t at = token[i] + (corner & 1) + (corner >> 1) * columns[i];
          corners[i] -= static_cast<Integer>(padding[at]) << corner;
        }
      }
    }
  }

  // From `dots` to the gradients of the cells' x and y and of attention.
  void differentiate() {
    for (int64_t i = 0; i < count; i += lanes_of<T>()) {
      V d[4], px, py, a;
      I corners_;
      for (int corner = 0; corner < 4; ++corner) {
        T turned[lanes_of<T>()];
        for (int64_t lane = 0; lane < lanes_of<T>(); ++lane) {
          turned[lane] = dots[4 * (i + lane) + corner];
        }
        load(d[corner], turned);
      }
      load(px, &right[i]);
      load(py, &below[i]);
      load(a, &attention[first + i]);
      load(corners_, &corners[i]);
      const V along_top = d[1] - d[0], along_bottom = d[3] - d[2];
      const V upper = d[0] + px * along_top, along_y = d[2] + px * along_bottom - upper;
      const V along_x = along_top + py * (along_bottom - along_top);
      // Where nothing is sampled, an infinite or NaN weight must not matter.
      const I is_inside = LESS(I{}, corners_);
      store(&grad_attention[i], upper + py * along_y);
      store(&grad_x[i], WHERE(is_inside, a * along_x));
      store(&grad_y[i], WHERE(is_inside, a * along_y));
    }
  }

  int64_t first_level, last_level, first, count; // first: of the head's samples
  // In cells, minus the half cell to the centre of the first: x * scale + shift.
  std::vector<T> scale_x, scale_y, shift_x, shift_y;
  std::vector<T> width, height; // of the sample's level
  std::vector<Integer> columns, rows, start; // width and height again; first token
  std::vector<T> x, y; // as they are put
  std::vector<T> attention; // of all samples of the head
  std::vector<T> right, below; // from the upper left of the four corners
  std::vector<Integer> token; // of that corner
  // Bits of the corners to read: 1 upper left, 2 upper right, 4 lower left, 8 lower right. The
  // others could hold NaN, which a weight of zero would not remove.
  std::vector<Integer> corners;
  std::vector<T> weight[4]; // bilinear times attention
  std::vector<T> dots; // of the value of each sample's four corners and the output's gradient
  std::vector<T> grad_x, grad_y, grad_attention;
};

// output[N vectors of channels] = weighted sum of samples.
template <typename T, typename V, int N, typename S>
inline void sum_samples(const Samples<T>& s, const S* value, int64_t stride, S* output) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  V sum[N] = {};
  for (int64_t i = 0; i < s.count; ++i) {
    const S* row = value + s.token[i] * stride;
    const int64_t down = s.columns[i] * stride;
    const S* const rows[4] = {row, row + stride, row + down, row + down + stride};
    const auto corners = s.corners[i];
    if (corners == 15) {
      const T w0 = s.weight[0][i], w1 = s.weight[1][i], w2 = s.weight[2][i],
              w3 = s.weight[3][i];
      for (int v = 0; v < N; ++v) {
        V a, b, c, d;
        load(a, rows[0] + v * lanes);
        load(b, rows[1] + v * lanes);
        load(c, rows[2] + v * lanes);
        load(d, rows[3] + v * lanes);
        sum[v] += a * w0 + b * w1 + c * w2 + d * w3;
      }
    } else if (corners != 0) {
      for (int corner = 0; corner < 4; ++corner) {
        if (corners >> corner & 1) {
          for (int v = 0; v < N; ++v) {
            V a;
            load(a, rows[corner] + v * lanes);
            sum[v] += a * s.weight[corner][i];
          }
        }
      }
    }
  }
  for (int v = 0; v < N; ++v) {
    store(output + v * lanes, sum[v]);
  }
}

// Adds to `dots` the products of the output's gradient and the corners' values.
template <typename T, typename V, int N, typename S>
inline void multiply_samples(Samples<T>& s, const S* value, int64_t stride, const S* grad_output) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  V grad[N];
  for (int v = 0; v < N; ++v) {
    load(grad[v], grad_output + v * lanes);
  }
  for (int64_t i = 0; i < s.count; ++i) {
    const S* row = value + s.token[i] * stride;
    const int64_t down = s.columns[i] * stride;
    const S* const rows[4] = {row, row + stride, row + down, row + down + stride};
    const auto corners = s.corners[i];
    V products[4] = {};
    if (corners == 15) {
      for (int v = 0; v < N; ++v) {
        for (int corner = 0; corner < 4; ++corner) {
          V a;
          load(a, rows[corner] + v * lanes);
          products[corner] += a * grad[v];
        }
      }
    } else {
      for (int corner = 0; corner < 4; ++corner) {
        for (int v = 0; v < (corners >> corner & 1 ? N : 0); ++v) {
          V a;
          load(a, rows[corner] + v * lanes);
          products[corner] += a * grad[v];
        }
      }
    }
    add_sums(&s.dots[4 * i], products);
  }
}

// Adds the output's gradient, weighted, to the corners in grad_value, which begins at first_token.
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
    T* row = grad_value + (s.token[i] - first_token) * stride;
    const int64_t down = s.columns[i] * stride;
    T* const rows[4] = {row, row + stride, row + down, row + down + stride};
    const auto corners = s.corners[i];
    for (int corner = 0; corner < 4; ++corner) {
      if (corners >> corner & 1) {
        const T weight = s.weight[corner][i];
        for (int v = 0; v < N; ++v) {
          V g;
          load(g, rows[corner] + v * lanes);
          g += grad[v] * weight;
          store(rows[corner] + v * lanes, g);
        }
      }
    }
  }
}

// Calls f.template run<V, N>(first channel) until all channels are covered: any D is a sum of
// 8, 4, 2 and 1 vectors and single numbers.
template <typename T, typename F>
inline void for_channels(int64_t channels, const F& f) {
  using V = typename Simd<T>::vector;
  constexpr int lanes = lanes_of<T>();
  int64_t c = 0;
  for (; channels - c >= 8 * lanes; c += 8 * lanes) {
    f.template run<V, 8>(c);
  }
  if (channels - c >= 4 * lanes) {
    f.template run<V, 4>(c);
    c += 4 * lanes;
  }
  if (channels - c >= 2 * lanes) {
    f.template run<V, 2>(c);
    c += 2 * lanes;
  }
  if (channels - c >= lanes) {
    f.template run<V, 1>(c);
    c += lanes;
  }
  for (; c < channels; ++c) {
    f.template run<T, 1>(c);
  }
}

template <typename T, typename S>
struct SumSamples {
  const Samples<T>& samples;
  const S* value;
  int64_t stride;
  S* output;

  template <typename V, int N>
  inline void run(int64_t c) const {
    sum_samples<T, V, N>(samples, value + c, stride, output + c);
  }
};

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

// Rows [begin, end) of the B * Q rows of the output.
template <typename T, typename S, typename Source>
void sample_rows(
    const Sizes& z,
    Source source,
    const S* value,
    S* output,
    int64_t begin,
    int64_t end) {
  const int64_t stride = z.heads * z.channels;
  Samples<T> samples(z, 0, z.levels.size());
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / z.queries;
    source.start(samples, row);
    for (int64_t head = 0; head < z.heads; ++head) {
      source.put(samples, row, head);
      samples.locate(source.padding_of(image));
      const int64_t channel = head * z.channels;
      for_channels<T>(
          z.channels,
          SumSamples<T, S>{samples, value + image * z.tokens * stride + channel, stride,
                           output + row * stride + channel});
    }
  }
}

// The gradients of everything but the value, of rows [begin, end) of B * Q.
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
    source.start(samples, row);
    for (int64_t head = 0; head < z.heads; ++head) {
      source.put(samples, row, head);
      samples.locate(source.padding_of(image));
      std::fill(samples.dots.begin(), samples.dots.end(), T(0));
      const int64_t channel = head * z.channels;
      for_channels<T>(
          z.channels,
          MultiplySamples<T, S>{samples, value + image * z.tokens * stride + channel, stride,
                                grad_output + row * stride + channel});
      samples.differentiate();
      source.take(samples, row, head);
    }
    source.finish(samples, row);
  }
}

// The gradient of the value, of tasks [begin, end) of B * H * parts, where a part is levels / parts
// levels. A task owns its head and levels of grad_value and scans all queries in order: no atomics,
// and the same result for any number of parts and threads. It adds up in a buffer, where the tokens
// of its head lie side by side: as far apart as in grad_value, they would share few cache lines.
template <typename T, typename S, typename Source>
void scatter_parts(
    const Sizes& z,
    Source source,
    const S* grad_output,
    S* grad_value,
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
    for (int64_t row = image * z.queries; row < (image + 1) * z.queries; ++row) {
      source.start(samples, row);
      source.put(samples, row, head);
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
