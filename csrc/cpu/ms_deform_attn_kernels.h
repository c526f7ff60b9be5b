// The loops of deformable attention on the CPU. No include guard: ms_deform_attn.cpp includes this
// once per instruction set, in a namespace of its own and with VECTOR_BYTES set. The vectors are
// those of GCC and Clang, which become AVX-512, AVX2, SSE2 or NEON; without them, single numbers.

#ifdef VECTOR_BYTES
template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(VECTOR_BYTES)));
};
#else
template <typename T>
struct VectorOf {
  using type = T;
};
#endif

template <typename V, typename T>
inline void load(V& vector, const T* from) {
  std::memcpy(&vector, from, sizeof(V));
}

template <typename V, typename T>
inline void store(T* to, const V& vector) {
  std::memcpy(to, &vector, sizeof(V));
}

// Where each of n samples lies: computed for all of them at once, which vectorises over samples.
template <typename T>
struct Samples {
  explicit Samples(int64_t n)
      : width(n), height(n), columns(n), start(n), x(n), y(n), offset(n), corners(n) {
    for (auto& w : weight) {
      w.resize(n);
    }
  }

  void set_level(int64_t begin, int64_t end, const Level& level) {
    for (int64_t i = begin; i < end; ++i) {
      width[i] = static_cast<T>(level.width);
      height[i] = static_cast<T>(level.height);
      columns[i] = level.width;
      start[i] = level.start;
    }
  }

  // locations: n pairs (x, y); stride: elements from one token to the next.
  void locate(int64_t n, const T* locations, const T* attention, int32_t stride) {
    const T *width_ = width.data(), *height_ = height.data();
    const int32_t *columns_ = columns.data(), *start_ = start.data();
    T *x_ = x.data(), *y_ = y.data();
    T *w0 = weight[0].data(), *w1 = weight[1].data(), *w2 = weight[2].data(),
      *w3 = weight[3].data();
    int32_t *offset_ = offset.data(), *corners_ = corners.data();
    IVDEP
    for (int64_t i = 0; i < n; ++i) {
      T px = locations[2 * i] * width_[i] - T(0.5);
      T py = locations[2 * i + 1] * height_[i] - T(0.5);
      // False for NaN. Only what lies inside is converted to an integer, so none overflows.
      const bool is_inside =
          (px > T(-1)) & (px < width_[i]) & (py > T(-1)) & (py < height_[i]);
      px = is_inside ? px : T(0);
      py = is_inside ? py : T(0);
      int32_t left = static_cast<int32_t>(px), top = static_cast<int32_t>(py);
      left -= px < static_cast<T>(left) ? 1 : 0; // floor
      top -= py < static_cast<T>(top) ? 1 : 0;
      px -= static_cast<T>(left);
      py -= static_cast<T>(top);
      const int32_t rows = static_cast<int32_t>(height_[i]);
      const int32_t has_left = left >= 0 ? 5 : 0, has_right = left + 1 < columns_[i] ? 10 : 0;
      const int32_t has_top = top >= 0 ? 3 : 0, has_bottom = top + 1 < rows ? 12 : 0;
      const int32_t corners = (has_left | has_right) & (has_top | has_bottom);
      corners_[i] = is_inside ? corners : 0;
      offset_[i] = (start_[i] + top * columns_[i] + left) * stride;
      x_[i] = px;
      y_[i] = py;
      const T lower = attention[i] * py, upper = attention[i] - lower;
      w1[i] = upper * px;
      w0[i] = upper - w1[i];
      w3[i] = lower * px;
      w2[i] = lower - w3[i];
    }
  }

  std::vector<T> width, height; // of the sample's level
  std::vector<int32_t> columns, start; // width again, first token
  std::vector<T> x, y; // from the upper left corner of the four
  std::vector<int32_t> offset; // of that corner, in elements
  // Bits of the corners inside: 1 upper left, 2 upper right, 4 lower left, 8 lower right. The
  // others are not read: they could hold NaN, which a weight of zero would not remove.
  std::vector<int32_t> corners;
  std::vector<T> weight[4]; // bilinear times attention
};

// output[N vectors of channels] = weighted sum of the samples.
template <typename T, typename V, int N>
inline void sum_samples(
    const Samples<T>& s,
    int64_t n,
    const T* value,
    int32_t stride,
    T* output) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  V sum[N] = {};
  for (int64_t i = 0; i < n; ++i) {
    const T* row = value + s.offset[i];
    const int64_t down = static_cast<int64_t>(s.columns[i]) * stride;
    const T* const rows[4] = {row, row + stride, row + down, row + down + stride};
    const int32_t corners = s.corners[i];
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

// Adds to grad_value, and to dots[4 i + corner] the product of grad_output with that corner's value.
template <typename T, typename V, int N>
inline void scatter_samples(
    const Samples<T>& s,
    int64_t begin,
    int64_t end,
    const T* value,
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
    const int32_t corners = s.corners[i];
    for (int corner = 0; corner < 4; ++corner) {
      if (corners >> corner & 1) {
        const T* row = value + at[corner];
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
        T parts[lanes];
        store(parts, dot);
        T sum = 0;
        for (int lane = 0; lane < lanes; ++lane) {
          sum += parts[lane];
        }
        dots[4 * i + corner] += sum;
      }
    }
  }
}

// Calls f.template run<V, N>(first channel) until all channels are covered: any D is a sum of
// 8, 4, 2 and 1 vectors and single numbers.
template <typename T, typename F>
inline void for_channels(int64_t channels, F& f) {
  using V = typename VectorOf<T>::type;
  constexpr int lanes = sizeof(V) / sizeof(T);
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

template <typename T>
struct SumSamples {
  const Samples<T>& samples;
  int64_t n;
  const T* value;
  int32_t stride;
  T* output;

  template <typename V, int N>
  inline void run(int64_t channel) {
    sum_samples<T, V, N>(samples, n, value + channel, stride, output + channel);
  }
};

template <typename T>
struct ScatterSamples {
  const Samples<T>& samples;
  int64_t begin, end;
  const T* value;
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
template <typename T>
void forward(const Sizes& z, const Inputs<T>& in, T* output, int64_t begin, int64_t end) {
  const int64_t n = z.samples();
  const auto stride = static_cast<int32_t>(z.heads * z.channels);
  Samples<T> samples(n);
  for (size_t level = 0; level < z.levels.size(); ++level) {
    samples.set_level(level * z.points, (level + 1) * z.points, z.levels[level]);
  }
  for (int64_t row = begin; row < end; ++row) {
    const T* image = in.value + row / z.queries * z.tokens * stride;
    for (int64_t head = 0; head < z.heads; ++head) {
      const int64_t first = (row * z.heads + head) * n;
      samples.locate(n, in.locations + 2 * first, in.weights + first, stride);
      SumSamples<T> sum{samples, n, image + head * z.channels, stride,
                        output + row * stride + head * z.channels};
      for_channels<T>(z.channels, sum);
    }
  }
}

// Tasks [begin, end) of B * levels * H. A task owns its level and head of grad_value and scans all
// queries in order: no atomics, and the same result for any number of threads.
template <typename T>
void backward(
    const Sizes& z,
    const Inputs<T>& in,
    const T* grad_output,
    const Gradients<T>& out,
    int64_t begin,
    int64_t end) {
  constexpr int64_t block = 32; // queries located at once
  const auto levels = static_cast<int64_t>(z.levels.size());
  const int64_t points = z.points;
  const auto stride = static_cast<int32_t>(z.heads * z.channels);
  Samples<T> s(block * points);
  std::vector<T> locations(block * points * 2), weights(block * points), dots(block * points * 4);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % z.heads, l = task / z.heads % levels;
    const int64_t image = task / z.heads / levels;
    const T width = static_cast<T>(z.levels[l].width);
    const T height = static_cast<T>(z.levels[l].height);
    const int64_t head_offset = image * z.tokens * stride + head * z.channels;
    s.set_level(0, block * points, z.levels[l]);
    for (int64_t first = 0; first < z.queries; first += block) {
      const int64_t count = std::min(block, z.queries - first), n = count * points;
      // Samples of query q start at ((image * Q + q) * H + head) * levels * P + l * P.
      const int64_t from =
          (((image * z.queries + first) * z.heads + head) * levels + l) * points;
      const int64_t step = z.heads * levels * points;
      for (int64_t q = 0; q < count; ++q) {
        std::copy_n(in.locations + 2 * (from + q * step), 2 * points, &locations[2 * q * points]);
        std::copy_n(in.weights + from + q * step, points, &weights[q * points]);
      }
      s.locate(n, locations.data(), weights.data(), stride);
      std::fill_n(dots.data(), 4 * n, T(0));
      for (int64_t q = 0; q < count; ++q) {
        ScatterSamples<T> scatter{
            s, q * points, (q + 1) * points, in.value + head_offset, stride,
            grad_output + (image * z.queries + first + q) * stride + head * z.channels,
            out.value + head_offset, dots.data()};
        for_channels<T>(z.channels, scatter);
      }
      for (int64_t i = 0; i < n; ++i) {
        const T x = s.x[i], y = s.y[i], *d = &dots[4 * i];
        const bool is_inside = s.corners[i] != 0;
        const T upper = d[0] + x * (d[1] - d[0]), lower = d[2] + x * (d[3] - d[2]);
        const T along_x = (d[1] - d[0]) * (1 - y) + (d[3] - d[2]) * y;
        const int64_t to = from + i / points * step + i % points;
        out.weights[to] = is_inside ? upper + y * (lower - upper) : 0;
        out.locations[2 * to] = is_inside ? weights[i] * along_x * width : 0;
        out.locations[2 * to + 1] = is_inside ? weights[i] * (lower - upper) * height : 0;
      }
    }
  }
}
