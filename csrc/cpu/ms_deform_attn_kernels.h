// The loops of deformable attention on the CPU. No include guard: ms_deform_attn.cpp includes this
// once per instruction set, after simd.h and in one namespace with it. T is the type that is
// computed with, S the one in which values are stored.

// Where n samples lie: computed for several at once.
template <typename T>
struct Samples {
  using Integer = typename Simd<T>::integer;

  explicit Samples(int64_t n) {
    n += lanes_of<T>() - 1; // the last vector may be partly beyond
    for (auto* numbers : {&width, &height, &x, &y, weight, weight + 1, weight + 2, weight + 3}) {
      numbers->resize(n);
    }
    for (auto* integers : {&columns, &rows, &start, &offset, &corners}) {
      integers->resize(n);
    }
  }

  void set_level(int64_t i, const Level& level) {
    width[i] = static_cast<T>(level.width);
    height[i] = static_cast<T>(level.height);
    columns[i] = level.width;
    rows[i] = level.height;
    start[i] = level.start;
  }

  // Sample i of what `locate` then works on: a location and its attention weight.
  void put(int64_t i, const T* location, T attention) {
    x[i] = location[0];
    y[i] = location[1];
    weight[0][i] = attention;
  }

  // For the n samples that were put; stride: elements from one token to the next.
  void locate(int64_t n, int32_t stride) {
    using V = typename Simd<T>::vector;
    using I = typename Simd<T>::integers;
    for (int64_t i = 0; i < n; i += lanes_of<T>()) {
      V px, py, w, h, attention;
      I columns_, rows_, start_;
      load(px, &x[i]);
      load(py, &y[i]);
      load(w, &width[i]);
      load(h, &height[i]);
      load(attention, &weight[0][i]);
      load(columns_, &columns[i]);
      load(rows_, &rows[i]);
      load(start_, &start[i]);
      px = px * w - T(0.5);
      py = py * h - T(0.5);
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
      const V lower = attention * py, upper = attention - lower;
      const V upper_right = upper * px, lower_right = lower * px;
      store(&corners[i], in_columns & in_rows & is_inside);
      store(&offset[i], (start_ + top * columns_ + left) * stride);
      store(&x[i], px);
      store(&y[i], py);
      store(&weight[0][i], upper - upper_right);
      store(&weight[1][i], upper_right);
      store(&weight[2][i], lower - lower_right);
      store(&weight[3][i], lower_right);
    }
  }

  std::vector<T> width, height; // of the sample's level
  std::vector<Integer> columns, rows, start; // width and height again; first token
  std::vector<T> x, y; // from the upper left of the four corners
  std::vector<Integer> offset; // of that corner, in elements
  // Bits of the corners inside: 1 upper left, 2 upper right, 4 lower left, 8 lower right. The
  // others are not read: they could hold NaN, which a weight of zero would not remove.
  std::vector<Integer> corners;
  std::vector<T> weight[4]; // bilinear times attention
};

// output[N vectors of channels] = weighted sum of samples [begin, end).
template <typename T, typename V, int N, typename S>
inline void sum_samples(
    const Samples<T>& s,
    int64_t begin,
    int64_t end,
    const S* value,
    int32_t stride,
    T* output) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  V sum[N] = {};
  for (int64_t i = begin; i < end; ++i) {
    const S* row = value + s.offset[i];
    const int64_t down = static_cast<int64_t>(s.columns[i]) * stride;
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

// Adds to grad_value, and to dots[4 i + corner] the product of grad_output and that corner's value.
template <typename T, typename V, int N, typename S>
inline void scatter_samples(
    const Samples<T>& s,
    int64_t begin,
    int64_t end,
    const S* value,
    int32_t stride,
    const T* grad_output,
    T* grad_value,
    T* dots) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  V grad[N];
  for (int v = 0; v < N; ++v) {
    load(grad[v], grad_output + v * lanes);
  }
  for (int64_t i = begin; i < end; ++i) {
    const int64_t down = static_cast<int64_t>(s.columns[i]) * stride;
    const int64_t at[4] = {s.offset[i], s.offset[i] + stride, s.offset[i] + down,
                           s.offset[i] + down + stride};
    const auto corners = s.corners[i];
    for (int corner = 0; corner < 4; ++corner) {
      if (corners >> corner & 1) {
        const S* row = value + at[corner];
        T* grad_row = grad_value + at[corner];
        const T weight = s.weight[corner][i];
        V dot = {};
        for (int v = 0; v < N; ++v) {
          V a, g;
          load(a, row + v * lanes);
          load(g, grad_row + v * lanes);
          dot += a * grad[v];
          g += grad[v] * weight;
          store(grad_row + v * lanes, g);
        }
        dots[4 * i + corner] += sum_lanes<T>(dot);
      }
    }
  }
}

// Calls f.template run<V, N>(first channel) until all channels are covered: any D is a sum of
// 8, 4, 2 and 1 vectors and single numbers.
template <typename T, typename F>
inline void for_channels(int64_t channels, F& f) {
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
  int64_t begin, end;
  const S* value;
  int32_t stride;
  T* output;

  template <typename V, int N>
  inline void run(int64_t channel) {
    sum_samples<T, V, N>(samples, begin, end, value + channel, stride, output + channel);
  }
};

template <typename T, typename S>
struct ScatterSamples {
  const Samples<T>& samples;
  int64_t begin, end;
  const S* value;
  int32_t stride;
  const T* grad_output;
  T* grad_value;
  T* dots;

  template <typename V, int N>
  inline void run(int64_t channel) {
    scatter_samples<T, V, N>(
        samples, begin, end, value + channel, stride, grad_output + channel,
        grad_value + channel, dots);
  }
};

// Rows [begin, end) of the B * Q rows of the output.
template <typename T, typename S>
void forward(const Sizes& z, const Inputs<T, S>& in, T* output, int64_t begin, int64_t end) {
  const int64_t n = z.samples(), total = z.heads * n;
  const auto stride = static_cast<int32_t>(z.heads * z.channels);
  Samples<T> samples(total);
  for (int64_t i = 0; i < total; ++i) {
    samples.set_level(i, z.levels[i % n / z.points]);
  }
  for (int64_t row = begin; row < end; ++row) {
    const S* image = in.value + row / z.queries * z.tokens * stride;
    const T* locations = in.locations + row * total * 2;
    const T* weights = in.weights + row * total;
    for (int64_t i = 0; i < total; ++i) {
      samples.put(i, locations + 2 * i, weights[i]);
    }
    samples.locate(total, stride);
    for (int64_t head = 0; head < z.heads; ++head) {
      const int64_t channel = head * z.channels;
      SumSamples<T, S> sum{samples, head * n, head * n + n, image + channel, stride,
                        output + row * stride + channel};
      for_channels<T>(z.channels, sum);
    }
  }
}

// Tasks [begin, end) of B * H * parts, where a part is levels / parts levels. A task owns its head
// and levels of grad_value and scans all queries in order: no atomics, and the same result for any
// number of parts and threads.
template <typename T, typename S>
void backward(
    const Sizes& z,
    const Inputs<T, S>& in,
    const T* grad_output,
    const Gradients<T>& out,
    int64_t parts,
    int64_t begin,
    int64_t end) {
  const int64_t part_samples = z.samples() / parts;
  const int64_t block = std::max<int64_t>(1, 128 / std::max<int64_t>(1, part_samples)); // queries
  const auto stride = static_cast<int32_t>(z.heads * z.channels);
  Samples<T> s(block * part_samples);
  std::vector<T> dots(4 * block * part_samples);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % parts, head = task / parts % z.heads;
    const int64_t image = task / parts / z.heads;
    const int64_t head_offset = image * z.tokens * stride + head * z.channels;
    for (int64_t i = 0; i < block * part_samples; ++i) {
      s.set_level(i, z.levels[(part * part_samples + i % part_samples) / z.points]);
    }
    for (int64_t first = 0; first < z.queries; first += block) {
      const int64_t count = std::min(block, z.queries - first), n = count * part_samples;
      // Where the samples of query q of the block start among all samples.
      const auto start = [&](int64_t q) {
        return ((image * z.queries + first + q) * z.heads + head) * z.samples() +
            part * part_samples;
      };
      for (int64_t q = 0, i = 0; q < count; ++q) {
        for (int64_t k = 0, at = start(q); k < part_samples; ++k, ++at, ++i) {
          s.put(i, in.locations + 2 * at, in.weights[at]);
        }
      }
      s.locate(n, stride);
      std::fill_n(dots.data(), 4 * n, T(0));
      for (int64_t q = 0; q < count; ++q) {
        const T* grad = grad_output + (image * z.queries + first + q) * stride + head * z.channels;
        ScatterSamples<T, S> scatter{
            s, q * part_samples, (q + 1) * part_samples, in.value + head_offset, stride,
            grad, out.value + head_offset, dots.data()};
        for_channels<T>(z.channels, scatter);
      }
      for (int64_t q = 0, i = 0; q < count; ++q) {
        for (int64_t k = 0, at = start(q); k < part_samples; ++k, ++at, ++i) {
          const bool is_inside = s.corners[i] != 0;
          const T x = s.x[i], y = s.y[i], *d = &dots[4 * i];
          const T upper = d[0] + x * (d[1] - d[0]), lower = d[2] + x * (d[3] - d[2]);
          const T along_x = (d[1] - d[0]) * (1 - y) + (d[3] - d[2]) * y;
          const T along_y = lower - upper, attention = in.weights[at];
          out.weights[at] = is_inside ? upper + y * along_y : 0;
          out.locations[2 * at] = is_inside ? attention * along_x * s.width[i] : 0;
          out.locations[2 * at + 1] = is_inside ? attention * along_y * s.height[i] : 0;
        }
      }
    }
  }
}
