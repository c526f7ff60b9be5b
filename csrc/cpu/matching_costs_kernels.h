// The loops of the matching costs on the CPU, vectorized over slots. No include guard: compiled
// once per instruction set.

#include "../box_costs.h"

#ifdef VECTOR_BYTES
struct Coefficients {
  double at[18];
};

constexpr Coefficients odd_inverses() {
  Coefficients c{};
  for (int i = 0; i < 18; ++i) {
    c.at[i] = 1.0 / (2 * i + 1);
  }
  return c;
}

// log(1 + x) for x in [0, 1]: 2 artanh(z) with z = x / (2 + x) <= 1/3.
template <typename T, typename V>
inline V log_one_plus(V x) {
  constexpr int terms = sizeof(T) == 4 ? 8 : 17;
  const V z = x / (2 + x), square = z * z;
  constexpr Coefficients c = odd_inverses();
  V sum = V{};
  for (int i = terms - 1; i >= 0; --i) {
    sum = sum * square + static_cast<T>(c.at[i]);
  }
  return 2 * z * sum;
}
#else
template <typename T>
inline T log_one_plus(T x) {
  return std::log1p(x);
}
#endif

template <typename T>
struct Block {
  alignas(64) T box[9 * BLOCK]; // consecutive MatchBoxes of vectors
  std::vector<T> class_cost; // [classes of the objects][BLOCK]; logits at first
  alignas(64) T largest[BLOCK], total[BLOCK]; // of the softmax: largest logit, sum of exponentials
};

// alpha (1 - p)^gamma (-log p) - (1 - alpha) p^gamma (-log(1 - p)) of logits, in place.
template <typename T>
void focal_class_costs(const Block<T>& block, int64_t n, const MatchWeights& weights, T* costs) {
  using V = typename Simd<T>::vector;
  const T yes_weight = static_cast<T>(weights.class_cost * weights.alpha);
  const T no_weight = static_cast<T>(weights.class_cost * (1 - weights.alpha));
  const T gamma = static_cast<T>(weights.gamma);
  for (int64_t i = 0; i < n; i += lanes_of<T>()) {
    V x;
    load(x, costs + i);
    const V zero = V{};
    const V log_part = log_one_plus<T>(exp_of_negative<T>(x < zero ? x : -x));
    const V minus_log_no = larger(x, zero) + log_part; // -log(1 - p)
    const V minus_log_yes = larger(-x, zero) + log_part; // -log(p)
    const V cost = yes_weight * exp_of_negative<T>(-gamma * minus_log_no) * minus_log_yes -
        no_weight * exp_of_negative<T>(-gamma * minus_log_yes) * minus_log_no;
    store(costs + i, cost);
  }
}

// Minus the softmax probability of logits, in place.
template <typename T>
void softmax_class_costs(const Block<T>& block, int64_t n, const MatchWeights& weights, T* costs) {
  using V = typename Simd<T>::vector;
  const T weight = static_cast<T>(weights.class_cost);
  for (int64_t i = 0; i < n; i += lanes_of<T>()) {
    V x, largest, total;
    load(x, costs + i);
    load(largest, block.largest + i);
    load(total, block.total + i);
    store(costs + i, V(-weight * exp_of_negative<T>(V(x - largest)) / total));
  }
}

// Largest logit and sum of exponentials of one slot's K logits.
template <typename T>
void normalise(const T* logits, int64_t classes, T& largest, T& total) {
  using V = typename Simd<T>::vector;
  largest = *std::max_element(logits, logits + classes);
  V sum = V{}, part;
  for (int64_t k = 0; k < classes; k += lanes_of<T>()) {
    if (classes - k >= lanes_of<T>()) {
      load(part, logits + k);
    } else { // padding adds exp(-infinity) = 0
      T last[lanes_of<T>()];
      std::fill(last, last + lanes_of<T>(), -std::numeric_limits<T>::infinity());
      std::copy(logits + k, logits + classes, last);
      load(part, last);
    }
    sum += exp_of_negative<T>(V(part - largest));
  }
  total = fold_lanes<T, Add>(sum);
}

// Costs of n <= BLOCK slots for the objects of their image, which are sorted by label.
template <typename T>
void match_costs(const MatchTask<T>& task, const MatchWeights& weights, bool is_softmax) {
  using V = typename Simd<T>::vector;
  constexpr int64_t lanes = lanes_of<T>();
  Block<T> block;
  block.class_cost.resize(task.count * BLOCK);
  const int64_t n = task.slots;
  for (int64_t i = 0; i < n; ++i) {
    const T* box = task.boxes + i * task.box_stride;
    const MatchBox<T> full = match_box(box[0], box[1], box[2], box[3]);
    T parts[9];
    std::memcpy(parts, &full, sizeof(parts));
    for (int64_t part = 0; part < 9; ++part) {
      block.box[(i / lanes * 9 + part) * lanes + i % lanes] = parts[part];
    }
    // Gather all logits of a slot before the next one: they share cache lines.
    const T* logits = task.logits + i * task.logit_stride;
    T* to = block.class_cost.data() + i;
    for (int64_t j = 0; j < task.count; ++j) {
      if (j == 0 || task.objects[j].label != task.objects[j - 1].label) {
        *to = logits[task.objects[j].label];
        to += BLOCK;
      }
    }
    if (is_softmax) {
      normalise(logits, task.classes, block.largest[i], block.total[i]);
    }
  }
  const T l1 = static_cast<T>(weights.l1), giou = static_cast<T>(weights.giou);
  T* class_cost = block.class_cost.data();
  for (const MatchObject<T>* object = task.objects; object < task.objects + task.count; ++object) {
    const T* box = object->box;
    const MatchBox<T> target = match_box(box[0], box[1], box[2], box[3]);
    const bool is_first = object == task.objects;
    if (is_first || object->label != object[-1].label) {
      class_cost += is_first ? 0 : BLOCK;
      (is_softmax ? softmax_class_costs<T> : focal_class_costs<T>)(block, n, weights, class_cost);
    }
    T* row = task.cost + object->row * task.pitch;
    for (int64_t i = 0; i < n; i += lanes) {
      MatchBox<V> boxes;
      std::memcpy(&boxes, block.box + 9 * i, sizeof(boxes));
      V cost;
      load(cost, class_cost + i);
      cost += box_cost<T, V>(boxes, target, l1, giou);
      if (n - i >= lanes) {
        store(row + i, cost);
      } else {
        T last[lanes];
        store(last, cost);
        std::copy(last, last + (n - i), row + i);
      }
    }
  }
}
