// Fused deformable attention on the GPU, forward.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "deformable_attention.cuh"

namespace dn_detr {
namespace {

constexpr int FORWARD_THREADS = 512;

// A corner that counts nothing may be no cell at all, or hold NaN. It is neither read nor added,
// what was read before stays in its place. By predicates, not branches: all four corners of a
// sample are on their way at the same time.
template <typename S, int VECTOR, typename T>
__device__ __forceinline__ void load_if_counted(Pack<S, VECTOR>& to, const S* from, T share) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(to) == 16 && sizeof(T) == 4) {
    uint32_t* word = reinterpret_cast<uint32_t*>(&to);
    asm("{.reg .pred p; setp.neu.f32 p, %5, 0f00000000;\n\t"
        "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "+r"(word[0]), "+r"(word[1]), "+r"(word[2]), "+r"(word[3])
        : "l"(from), "f"(share));
    return;
  }
#endif
  if (share != T(0)) {
    to.load(from);
  }
}

template <typename T>
__device__ __forceinline__ void add_if_counted(T& sum, T share, T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {
    asm("{.reg .pred p; setp.neu.f32 p, %1, 0f00000000; @p fma.rn.f32 %0, %1, %2, %0;}"
        : "+f"(sum)
        : "f"(share), "f"(x));
    return;
  }
#endif
  if (share != T(0)) {
    sum += share * x;
  }
}

// STRIDE: channels from token to token, if the compiler is to know it, else 0.
template <typename S, typename O, typename T, int VECTOR, int LANES, int STRIDE>
__global__ void __launch_bounds__(FORWARD_THREADS, 2)
    forward_kernel(const Problem<S, O, T> problem, S* __restrict__ output) {
  const Geometry& g = problem.g;
  const int32_t lane = threadIdx.x % LANES, samples = problem.samples;
  const int32_t stride = STRIDE > 0 ? STRIDE : g.stride();
  const int32_t image = problem.first_image + blockIdx.z;
  const Spot spot = find_spot<LANES>(problem.order);
  const int64_t query = static_cast<int64_t>(image) * g.queries + spot.query;
  const int64_t row = query * g.heads + spot.head;
  const T* valid_sizes = problem.valid_sizes + static_cast<int64_t>(image) * 2 * g.levels;
  const T* reference =
      problem.reference + query * (problem.reference_levels * problem.coordinates);
  const O* logits = problem.logits + row * samples;
  const T largest = largest_logit<LANES, T>(logits, samples, lane);
  keep(valid_sizes);
  keep(reference);
  for (int32_t block = 0; block < g.channels; block += LANES * VECTOR) {
    // Lanes beyond the last channel do as the last one does, and write nothing.
    const int32_t channel = block + lane * VECTOR;
    const S* left = problem.value + static_cast<int64_t>(image) * g.tokens * stride +
        spot.head * g.channels + min(channel, g.channels - VECTOR);
    const S* right = left + stride;
    const O* offset = problem.offsets + 2 * (row * samples + lane);
    const O* logit = logits + lane;
    keep(left);
    keep(right);
    keep(offset);
    keep(logit);
    T sum[VECTOR] = {}, powers = 0;
    Pack<S, VECTOR> corner[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      corner[i].clear();
    }
    Raw<T> next{};
    if (lane < samples) {
      next = read_sample<T>(offset, logit);
    }
#pragma unroll 1
    for (int32_t first = 0; first < samples; first += LANES) {
      const int32_t s = first + lane;
      const Raw<T> raw = next;
      offset += 2 * LANES;
      logit += LANES;
      if (s + LANES < samples) {
        next = read_sample<T>(offset, logit);
      }
      // Lanes beyond the last sample weigh theirs with 0.
      const T power = s < samples ? power_of(raw.logit, largest) : T(0);
      powers += power;
      const Sample<T> own = locate(
          problem, valid_sizes, reference, image, stride, min(s, samples - 1), raw, spot.exists);
      T own_share[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        own_share[i] = own.has[i] ? power * own.bilinear(i) : T(0);
      }
      const int many = min(LANES, samples - first);
#pragma unroll 1
      for (int from = 0; from < many; ++from) {
        const int32_t at[2] = {tell<LANES>(own.upper, from), tell<LANES>(own.lower, from)};
        T share[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          share[i] = tell<LANES>(own_share[i], from);
          const S* here = advance(
              STRIDE == 0 && i % 2 ? right : left, at[i / 2], problem.size_of_value);
          load_if_counted(corner[i], here + i % 2 * STRIDE, share[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          T number[VECTOR];
          unpack(corner[i], number);
#pragma unroll
          for (int k = 0; k < VECTOR; ++k) {
            add_if_counted(sum[k], share[i], number[k]);
          }
        }
      }
    }
    const T factor = T(1) / sum_of_lanes<LANES>(powers);
    if (spot.exists && channel < g.channels) {
      Pack<S, VECTOR> result;
#pragma unroll
      for (int k = 0; k < VECTOR; ++k) {
        result.number[k] = static_cast<S>(sum[k] * factor);
      }
      result.store(output + row * g.channels + channel);
    }
    if (LANES < 32) {
      break; // with fewer lanes one block of channels is all there is
    }
  }
}

at::Tensor deformable_attention(
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& valid_sizes,
    const at::Tensor& reference,
    const at::Tensor& offsets,
    const at::Tensor& logits,
    const std::optional<at::Tensor>& padding) {
  const DeformableSizes sizes = check_deformable_attention(
      value, spatial_shapes, valid_sizes, reference, offsets, logits, padding);
  const c10::cuda::CUDAGuard guard(value.device());
  auto output =
      at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, value.options());
  if (output.numel() == 0 || logits.numel() == 0) {
    return output.zero_();
  }
  if (must_be_widened(value)) {
    return deformable_attention(
               value.to(at::kFloat), spatial_shapes, valid_sizes, reference, offsets.to(at::kFloat),
               logits.to(at::kFloat), padding)
        .to(value.scalar_type());
  }
  const DeformableInputs inputs{
      aligned(value), aligned(valid_sizes), aligned(reference), aligned(offsets), aligned(logits),
      padding ? padding->contiguous() : at::Tensor()};
  choose_types(value, offsets, [&](auto s, auto o, auto t) {
    using S = decltype(s);
    using O = decltype(o);
    using T = decltype(t);
    auto problem = inputs.problem<S, O, T>(sizes);
    choose_tiling<S>(sizes.channels, [&](auto vector, auto lanes) {
      constexpr int V = vector.value, N = lanes.value;
      problem.order =
          order_of(problem.g, N, sizes.channels * sizeof(S), FORWARD_THREADS);
      S* out = output.mutable_data_ptr<S>();
      if constexpr (V > 1 && V * N == 32) {
        // 8 heads of 32 channels, as in every paper: their addresses are half as many.
        if (problem.g.stride() == 256) {
          return launch_on_images(forward_kernel<S, O, T, V, N, 256>, problem, out);
        }
      }
      launch_on_images(forward_kernel<S, O, T, V, N, 0>, problem, out);
    });
  });
  return output;
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CUDA, m) {
  m.impl("deformable_attention", deformable_attention);
}

} // namespace dn_detr
