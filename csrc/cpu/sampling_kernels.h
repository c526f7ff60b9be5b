// Loops shared by the operators of deformable attention on the CPU. No include guard: compiled once
// per instruction set, after simd.h. T is the type of the computation, S the stored type of values.
//
// A source provides the samples, from the inputs of an operator:
//   source.start_query(samples, row)      sets scale and shift, from x and y to cells
//   source.load_head(samples, row, head)  sets x, y and attention of the samples of a head
//   source.padding_of(image)              mask of its tokens that are padding, or null

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
    // The last vector may be partly filled: the extra samples belong to a level without cells.
    const int64_t n = count + lanes_of<T>();
    for (auto* values :
         {&scale_x, &scale_y, &shift_x, &shift_y, &width, &height, &x, &y, &right, &below, &grad_x,
          &grad_y, &grad_attention, weight, weight + 1, weight + 2, weight + 3}) {
      values->resize(n);
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

  // Computes tokens, corners and weights from x, y and attention. padding: of the image, or null.
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
      // False for NaN. Only positions inside are converted to integers, so none overflows.
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
      remove_padding(padding);
    }
  }

  // Clears the bits of corners that are padding.
  void remove_padding(const bool* padding) {
    for (int64_t i = 0; i < count; ++i) {
      for (int corner = 0; corner < 4; ++corner) {
        if (corners[i] >> corner & 1) {
          const int64_t at = token[i] + (corner & 1) + (corner >> 1) * columns[i];
          corners[i] -= static_cast<Integer>(padding[at]) << corner;
        }
      }
    }
  }

  // Computes the gradients of positions in cells and of attention from `dots`.
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
      // Samples outside get no gradient, even if their weight is infinite or NaN.
      const I is_inside = LESS(I{}, corners_);
      store(&grad_attention[i], upper + py * along_y);
      store(&grad_x[i], WHERE(is_inside, a * along_x));
      store(&grad_y[i], WHERE(is_inside, a * along_y));
    }
  }

  int64_t first_level, last_level, first, count; // first: of the head's samples
  // Position in cells, from the centre of the first: x * scale + shift.
  std::vector<T> scale_x, scale_y, shift_x, shift_y;
  std::vector<T> width, height; // of the sample's level
  std::vector<Integer> columns, rows, start; // width, height and first token as integers
  std::vector<T> x, y; // as the source set them
  std::vector<T> attention; // of all samples of the head
  std::vector<T> right, below; // distance from the upper left of the four corners
  std::vector<Integer> token; // of that corner
  // Bits of the corners to read: 1 upper left, 2 upper right, 4 lower left, 8 lower right. Others
  // could hold NaN, which a weight of zero does not remove.
  std::vector<Integer> corners;
  std::vector<T> weight[4]; // bilinear times attention
  std::vector<T> dots; // products of the output's gradient and each of the four corners
  std::vector<T> grad_x, grad_y, grad_attention;
};

// output[N vectors of channels] = weighted sum of samples.
template <typename T, typename V, int N, typename S>
inline void sum_samples(const Samples<T>& s, const S* value, int64_t stride, S* output) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  V sum[N] = {};
  for (int64_t i = 0; i < s.count; ++i) {
    // Offsets, not addresses: corners that do not exist may lie outside of the memory.
    const int64_t row = s.token[i] * stride, down = s.columns[i] * stride;
    const int64_t rows[4] = {row, row + stride, row + down, row + down + stride};
    const auto corners = s.corners[i];
    if (corners == 15) {
      const S* first = value + row;
      const T w0 = s.weight[0][i], w1 = s.weight[1][i], w2 = s.weight[2][i],
              w3 = s.weight[3][i];
      for (int v = 0; v < N; ++v) {
        V a, b, c, d;
        load(a, first + v * lanes);
        load(b, first + stride + v * lanes);
        load(c, first + down + v * lanes);
        load(d, first + down + stride + v * lanes);
        sum[v] += a * w0 + b * w1 + c * w2 + d * w3;
      }
    } else if (corners != 0) {
      for (int corner = 0; corner < 4; ++corner) {
        if (corners >> corner & 1) {
          const S* from = value + rows[corner];
          for (int v = 0; v < N; ++v) {
            V a;
            load(a, from + v * lanes);
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

// Calls f.template run<V, N>(first channel) until all channels are covered, in blocks of 8, 4, 2
// and 1 vectors and single values.
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
    source.start_query(samples, row);
    for (int64_t head = 0; head < z.heads; ++head) {
      source.load_head(samples, row, head);
      samples.locate(source.padding_of(image));
      const int64_t channel = head * z.channels;
      for_channels<T>(
          z.channels,
          SumSamples<T, S>{samples, value + image * z.tokens * stride + channel, stride,
                           output + row * stride + channel});
    }
  }
}
