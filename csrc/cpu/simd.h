// Vectors of numbers. No include guard: included once per instruction set, inside a namespace and
// with VECTOR_BYTES set. The vectors are those of GCC and Clang, which become AVX-512, AVX2, SSE2 or
// NEON; without them (VECTOR_BYTES not set), single numbers.

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

// Sum of the lanes, pairwise.
template <typename T, typename V>
inline T sum_lanes(const V& vector) {
  if constexpr (sizeof(V) == sizeof(T)) {
    return vector;
  } else if constexpr (sizeof(V) == 2 * sizeof(T)) {
    T pair[2];
    store(pair, vector);
    return pair[0] + pair[1];
  } else {
    typename Vector<T, sizeof(V) / 2>::type low, high;
    std::memcpy(&low, &vector, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&vector) + sizeof(low), sizeof(high));
    return sum_lanes<T>(low + high);
  }
}
