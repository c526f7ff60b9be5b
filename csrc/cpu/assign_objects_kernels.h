// Vectorized scans of costs and logits on the CPU. No include guard: compiled once per instruction
// set.

// Whether one of n values is infinite or NaN.
template <typename T>
bool has_nonfinite(const T* numbers, int64_t n) {
  using V = typename Simd<T>::vector;
  V sums[4] = {}; // of x - x: 0, or NaN
  int64_t i = 0;
  for (; i + 4 * lanes_of<T>() <= n; i += 4 * lanes_of<T>()) {
    for (int64_t part = 0; part < 4; ++part) {
      V x;
      load(x, numbers + i + part * lanes_of<T>());
      sums[part] += x - x;
    }
  }
  T sum = fold_lanes<T, Add>(V(sums[0] + sums[1] + sums[2] + sums[3]));
  for (; i < n; ++i) {
    sum += numbers[i] - numbers[i];
  }
  return !(sum == 0);
}

// The first of the cheapest of n columns, or -1 if all are closed; closed is 0 or infinity.
template <typename T>
int32_t cheapest(const T* cost, const T* closed, int32_t n) {
  using V = typename Simd<T>::vector;
  using Integer = typename Simd<T>::integer;
  constexpr int32_t lanes = static_cast<int32_t>(lanes_of<T>());
  Integer numbers[lanes];
  std::iota(numbers, numbers + lanes, Integer(0));
  typename Simd<T>::integers column, where;
  load(column, numbers);
  where = column;
  T least[lanes];
  std::fill(least, least + lanes, std::numeric_limits<T>::infinity());
  V best, price, barrier;
  load(best, least);
  int32_t i = 0;
  for (; i + lanes <= n; i += lanes, column += lanes) {
    load(price, cost + i);
    load(barrier, closed + i);
    price += barrier;
    const auto is_less = price < best;
    best = is_less ? price : best;
    where = is_less ? column : where;
  }
  store(least, best);
  store(numbers, where);
  T found = std::numeric_limits<T>::infinity();
  int32_t place = -1;
  for (int32_t lane = 0; lane < lanes; ++lane) {
    const auto number = static_cast<int32_t>(numbers[lane]);
    if (least[lane] < found || (least[lane] == found && place >= 0 && number < place)) {
      found = least[lane];
      place = number;
    }
  }
  for (; i < n; ++i) {
    if (cost[i] + closed[i] < found) {
      found = cost[i] + closed[i];
      place = i;
    }
  }
  return place;
}
