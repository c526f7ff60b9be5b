// CUDA on a CPU, for the kernels of csrc/cuda: what their sources use of the CUDA runtime, and the
// functions that translate.py calls in place of launches, shared variables and PTX. The threads of
// a block are fibers of one CPU thread; see emulator.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifndef EMULATED_CUDA_ARCH
#define EMULATED_CUDA_ARCH 900
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) double2 { double x, y; };

#define threadIdx (::emulator::indices[0])
#define blockIdx (::emulator::indices[1])
#define blockDim (::emulator::indices[2])
#define gridDim (::emulator::indices[3])

namespace emulator {
// Of the running thread: threadIdx, blockIdx, blockDim, gridDim.
extern dim3 indices[4];

// The place in the sources where a thread waits. As a default argument: that of the caller.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* f = __builtin_FILE(), int l = __builtin_LINE()) {
    return {f, l};
  }
};

// Ends the launch with an error; the launching function throws it.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// A kernel with its arguments, which its threads may read.
struct Call {
  void (*function)(const void*);
  const void* data;
  size_t size;
};
void run(dim3 grid, dim3 block, size_t shared, Call call);

template <typename F, typename... Arguments>
void launch(dim3 grid, dim3 block, size_t shared, F kernel, Arguments... arguments) {
  const auto call = [=] { kernel(arguments...); };
  const auto function = [](const void* c) { (*static_cast<decltype(call)*>(c))(); };
  run(grid, block, shared, {function, &call, sizeof(call)});
}

void check_launch_bounds(unsigned most_threads);

// A shared variable of the block, the same for all threads; dynamic: that of the launch.
void* shared_memory(size_t size, size_t alignment, const char* name, bool is_dynamic = false);

// Something that the threads of a warp or a block do together. Returns what a thread gets: the
// value of lane `source`; lanes whose value is not zero (VOTE); the sum (COUNT); nothing.
enum Meeting { SHUFFLE, VOTE, SYNC_WARP, SYNC, SYNC_COUNT, SYNC_OR };
uint64_t meet_warp(Meeting kind, unsigned mask, uint64_t value, int source, Place place);
int meet_block(Meeting kind, int value, Place place);

enum Kind { READ, WRITE, ATOMIC };
void access(const void* address, size_t size, Kind kind, const void* caller);

inline __attribute__((always_inline)) void check(const void* address, size_t size, Kind kind) {
  access(address, size, kind, __builtin_return_address(0));
}

// The accesses below are checked as a whole, with their alignment, and not part by part.
#define EMULATOR_UNCHECKED __attribute__((noinline, no_sanitize("thread")))

template <typename T>
EMULATOR_UNCHECKED T load(const T* from) {
  check(from, sizeof(T), READ);
  return *from;
}

template <typename T>
EMULATOR_UNCHECKED T atomic_add(T* to, T x) {
  check(to, sizeof(T), ATOMIC);
  const T before = *to;
  *to += x;
  return before;
}

// red.v4.f32: four sums, each atomic, at an address aligned to all of them.
EMULATOR_UNCHECKED inline void red_v4(float* to, float a, float b, float c, float d) {
  check(to, 16, ATOMIC);
  to[0] += a, to[1] += b, to[2] += c, to[3] += d;
}

template <typename T>
EMULATOR_UNCHECKED void load_v4(T& a, T& b, T& c, T& d, const void* from) {
  check(from, 4 * sizeof(T), READ);
  const T* parts = static_cast<const T*>(from);
  a = parts[0], b = parts[1], c = parts[2], d = parts[3];
}

// mad.wide.s32: a 64-bit sum with a 32-bit signed product, which cannot overflow 64 bits.
template <typename T>
T* mad_wide(int32_t a, int32_t b, T* c) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(c) + int64_t{a} * b);
}

template <typename T>
T shuffle(unsigned mask, T x, int source, int width, Place place) {
  static_assert(sizeof(T) <= 8);
  const int lane = threadIdx.x % 32, first = lane / width * width;
  if (source < first || source >= first + width) { // as in hardware: the own value
    source = lane;
  }
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  bits = meet_warp(SHUFFLE, mask, bits, source, place);
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

// Converts as cvt.rni.s64 does: to the nearest even integer, clamped; NaN is the least.
template <typename T>
int64_t to_integer(T x) {
  const T limit = T(9223372036854775808.0); // 2^63
  if (!(x >= -limit)) {
    return INT64_MIN;
  }
  return x >= limit ? INT64_MAX : std::llrint(x);
}

} // namespace emulator


// ------------------------------------------------------------------------------- intrinsics

using emulator::Place;

template <typename T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32, Place place = Place::here()) {
  const int first = threadIdx.x % 32 / width * width;
  return emulator::shuffle(mask, x, first + (source & (width - 1)), width, place);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int with, int width = 32, Place place = Place::here()) {
  return emulator::shuffle(mask, x, int(threadIdx.x % 32) ^ with, width, place);
}

inline unsigned __ballot_sync(unsigned mask, int x, Place place = Place::here()) {
  return emulator::meet_warp(emulator::VOTE, mask, x != 0, 0, place);
}
inline int __all_sync(unsigned mask, int x, Place place = Place::here()) {
  return __ballot_sync(mask, x, place) == mask;
}
inline int __any_sync(unsigned mask, int x, Place place = Place::here()) {
  return __ballot_sync(mask, x, place) != 0;
}
inline void __syncwarp(unsigned mask = ~0u, Place place = Place::here()) {
  emulator::meet_warp(emulator::SYNC_WARP, mask, 0, 0, place);
}
inline void __syncthreads(Place place = Place::here()) {
  emulator::meet_block(emulator::SYNC, 0, place);
}
inline int __syncthreads_count(int x, Place place = Place::here()) {
  return emulator::meet_block(emulator::SYNC_COUNT, x != 0, place);
}
inline int __syncthreads_or(int x, Place place = Place::here()) {
  return emulator::meet_block(emulator::SYNC_OR, x != 0, place) != 0;
}

template <typename T>
T __ldg(const T* from) {
  return emulator::load(from);
}
template <typename T>
T atomicAdd(T* to, T x) {
  return emulator::atomic_add(to, x);
}
template <typename T>
T* __cvta_generic_to_global(T* pointer) {
  return pointer;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t{a} * b >> 32; }
inline int64_t __float2ll_rn(float x) { return emulator::to_integer(x); }
inline int64_t __double2ll_rn(double x) { return emulator::to_integer(x); }
inline float __uint_as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
// The compiler may not fuse these with others; for x86-64 without FMA it fuses nothing.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float max(float a, float b) { return std::fmax(a, b); } // NaN is ignored
inline double max(double a, double b) { return std::fmax(a, b); }

// ------------------------------------------------------------------------- PyTorch's runtime

#ifdef EMULATOR_WITH_TORCH
#include <ATen/EmptyTensor.h>
#include <c10/core/Device.h>
#include <c10/macros/Macros.h>
#include <c10/util/Half.h>

#define C10_CUDA_KERNEL_LAUNCH_CHECK() // `launch` throws

struct __half2 { c10::Half x, y; };
inline float2 __half22float2(__half2 h) { return {float(h.x), float(h.y)}; }

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
  ~CUDAGuard() {} // used, for the compiler
};
inline int getCurrentCUDAStream() { return 0; }
} // namespace c10::cuda

namespace at::cuda {
struct EmulatedProperties { int multiProcessorCount = 132; }; // H100
inline const EmulatedProperties* getCurrentDeviceProperties() {
  static const EmulatedProperties properties;
  return &properties;
}
} // namespace at::cuda

namespace at::detail {
// Not filled under deterministic algorithms, as on CUDA.
inline at::TensorBase empty_cuda(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::detail::empty_cpu(sizes, options);
}
} // namespace at::detail
#endif

#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(x) ((x) ? void() : ::emulator::fail("device assertion %s", #x))
