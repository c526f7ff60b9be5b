// SIMD vectors. No include guard: included once per instruction set, inside a namespace, with
// VECTOR_BYTES set (instruction_sets.h). They are vector extensions of GCC and Clang, compiled to
// AVX-512, AVX2, SSE2 or NEON; without them (VECTOR_BYTES not set), scalars.

#undef LESS
#undef WHERE
#undef CONVERT

template <typename T, size_t BYTES>
struct Vector;

#ifdef VECTOR_BYTES
template <typename T, size_t BYTES>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES)));
};
template <typename T>
struct Simd {
  using vector = typename Vector<T, VECTOR_BYTES>::type;
  using integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  using integers = typename Vector<integer, VECTOR_BYTES>::type;
};
// All bits where a < b, else none.
#define LESS(a, b) ((a) < (b))
// x where the bits of mask are set, else 0.
#define WHERE(mask, x) ((decltype(x))((decltype(mask))(x) & (mask)))
#define CONVERT(x, ...) __builtin_convertvector(x, __VA_ARGS__)
#else
template <typename T>
struct Simd {
  using vector = T;
  using integer = int32_t;
  using integers = integer;
};
#define LESS(a, b) (-static_cast<int32_t>((a) < (b)))
#define WHERE(mask, x) ((mask) ? (x) : 0)
#define CONVERT(x, type) static_cast<type>(x)
#endif

template <typename T>
constexpr int64_t lanes_of() {
  return sizeof(typename Simd<T>::vector) / sizeof(T);
}

template <typename V, typename T>
inline void load(V& vector, const T* from) {
  std::memcpy(&vector, from, sizeof(V));
}

#ifdef VECTOR_BYTES
// bfloat16 is the upper half of a float32.
template <typename V>
inline void load(V& vector, const c10::BFloat16* from) {
  typename Vector<uint16_t, sizeof(V) / 2>::type upper;
  std::memcpy(&upper, from, sizeof(upper));
  const auto bits = CONVERT(upper, typename Vector<uint32_t, sizeof(V)>::type) << 16;
  std::memcpy(&vector, &bits, sizeof(V));
}
#endif

inline void load(float& number, const c10::BFloat16* from) {
  number = *from;
}

template <typename V, typename T>
inline void store(T* to, const V& vector) {
  std::memcpy(to, &vector, sizeof(V));
}

#ifdef VECTOR_BYTES
// Rounds to nearest, ties to even; NaN stays NaN, as one whose upper half is not zero.
template <typename V>
inline void store(c10::BFloat16* to, const V& vector) {
  using U = typename Vector<uint32_t, sizeof(V)>::type;
  U bits;
  std::memcpy(&bits, &vector, sizeof(V));
  const U rounded = bits + 0x7fff + (bits >> 16 & 1);
  const U is_nan = (U)(vector != vector);
  bits = (is_nan & (bits | 0x400000)) | (~is_nan & rounded);
  const auto upper = CONVERT(bits >> 16, typename Vector<uint16_t, sizeof(V) / 2>::type);
  std::memcpy(to, &upper, sizeof(upper));
}
#endif

inline void store(c10::BFloat16* to, float number) {
  *to = number;
}

// Prefetches n values, to be read or written later.
template <typename T>
inline void prefetch(const T* numbers, int64_t n) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) {
    __builtin_prefetch(numbers + i);
  }
#endif
}

template <typename T>
inline void prefetch_to_write(const T* numbers, int64_t n) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) {
    __builtin_prefetch(numbers + i, 1);
  }
#endif
}

struct Add {
  template <typename V>
  V operator()(const V& a, const V& b) const {
    return a + b;
  }
};

struct Max {
  template <typename V>
  V operator()(const V& a, const V& b) const {
    return LESS(a, b) ? b : a;
  }
};

// Pairwise reduction of the lanes.
template <typename T, typename F, typename V>
inline T fold_lanes(const V& vector) {
  if constexpr (sizeof(V) == sizeof(T)) {
    return vector;
  } else if constexpr (sizeof(V) == 2 * sizeof(T)) {
    T pair[2];
    store(pair, vector);
    return F()(pair[0], pair[1]);
  } else {
    typename Vector<T, sizeof(V) / 2>::type low, high;
    std::memcpy(&low, &vector, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&vector) + sizeof(low), sizeof(high));
    return fold_lanes<T, F>(F()(low, high));
  }
}

// to[i] += the sum of the lanes of x[i], in the order of fold_lanes.
template <typename T, typename V>
inline void add_sums(T* to, const V (&x)[4]) {
#if defined(VECTOR_BYTES) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
  if constexpr (sizeof(V) == 4 * sizeof(T)) {
    const V a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5) +
        __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
    const V b = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5) +
        __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
    V sums;
    load(sums, to);
    sums += __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    store(to, sums);
    return;
  } else if constexpr (sizeof(V) > 4 * sizeof(T)) {
    using Half = typename Vector<T, sizeof(V) / 2>::type;
    Half halves[4];
    for (int i = 0; i < 4; ++i) {
      Half low, high;
      std::memcpy(&low, &x[i], sizeof(low));
      std::memcpy(&high, reinterpret_cast<const char*>(&x[i]) + sizeof(low), sizeof(high));
      halves[i] = low + high;
    }
    add_sums(to, halves);
    return;
  }
#endif
#endif
  for (int i = 0; i < 4; ++i) {
    to[i] += fold_lanes<T, Add>(x[i]);
  }
}

// exp(x) for x <= 0 or NaN, within 2 units of the last place; 0 below the normal numbers.
template <typename T>
inline typename Simd<T>::vector exp_of_negative(const typename Simd<T>::vector& x) {
#ifdef VECTOR_BYTES
  using V = typename Simd<T>::vector;
  constexpr bool is_single = sizeof(T) == 4;
  // Unsigned: the bits of NaN overflow.
  using U = typename Vector<std::conditional_t<is_single, uint32_t, uint64_t>, VECTOR_BYTES>::type;
  constexpr int mantissa = is_single ? 23 : 52, terms = is_single ? 7 : 13;
  // Adding and subtracting it rounds to an integer, which is then in the lowest bits.
  constexpr T rounder = is_single ? T(12582912) : T(6755399441055744); // 1.5 * 2^mantissa
  const V shifted = x * T(1.4426950408889634) + rounder; // x / log(2)
  const V power = shifted - rounder;
  // log(2) in two parts; the first has trailing zeros, so that its product is exact.
  const V rest = x - power * T(is_single ? 0.693359375 : 0.6931471803691238) -
      power * T(is_single ? -2.12194440e-4 : 1.9082149292705877e-10);
  V series = V{} + 1;
  for (int i = terms; i > 0; --i) { // |rest| <= log(2) / 2
    series = series * rest * (T(1) / i) + 1;
  }
  U exponent;
  std::memcpy(&exponent, &shifted, sizeof(V));
  exponent = (exponent + (is_single ? 127 : 1023)) << mantissa; // shifts out the bits of rounder
  V scale;
  std::memcpy(&scale, &exponent, sizeof(V));
  return WHERE(~LESS(x, V{} + T(is_single ? -87 : -708)), series * scale);
#else
  return std::exp(x);
#endif
}
