// Compiles the file KERNELS once per instruction set, in the namespaces portable, avx2 and avx512,
// and dispatches between them. No include guard: each operator includes it with its own KERNELS,
// after all other headers and inside an unnamed namespace.

namespace portable {
#if defined(__GNUC__)
#define VECTOR_BYTES 16
#endif
#include "simd.h"
#include KERNELS
#undef VECTOR_BYTES
} // namespace portable

#if defined(__GNUC__) && defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define VECTOR_BYTES 32
#include "simd.h"
#include KERNELS
#undef VECTOR_BYTES
} // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#endif
namespace avx512 {
#define VECTOR_BYTES 64
#include "simd.h"
#include KERNELS
#undef VECTOR_BYTES
} // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// ATEN_CPU_CAPABILITY selects, as for PyTorch's own kernels.
template <typename F>
F* choose(F* portable, F* avx2, F* avx512) {
  static const std::string capability = at::get_cpu_capability();
  if (capability.rfind("AVX512", 0) == 0) {
    return avx512;
  }
  return capability == "AVX2" ? avx2 : portable;
}
#define KERNEL_FOR_THIS_CPU(...) \
  choose(portable::__VA_ARGS__, avx2::__VA_ARGS__, avx512::__VA_ARGS__)
#else
#define KERNEL_FOR_THIS_CPU(...) (&portable::__VA_ARGS__)
#endif
