// Forward pass of the fused deformable attention on the GPU.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "deformable_attention.cuh"

namespace dn_detr {
namespace {

constexpr int FORWARD_THREADS = 512;

// A corner of weight zero may not exist, or hold NaN: it is neither loaded nor added. Predicates
// instead of branches keep the loads of all four corners of a sample in flight.
template <typename S, int VECTOR, typename T>
__device__ __forceinline__ void load_if_nonzero(Pack<S, VECTOR>& to, const S* from, T weight) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(to) == 16 && sizeof(T) == 4) {
    uint32_t* word = reinterpret_cast<uint32_t*>(&to);
    asm("{.reg .pred p; setp.neu.f32 p, %5, 0f00000000;\n\t"
        "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "+r"(word[0]), "+r"(word[1]), "+r"(word[2]), "+r"(word[3])
        : "l"(from), "f"(weight));
    return;
  }
#endif
  if (weight != T(0)) {
    to.load(from);
  }
}

template <typename T>
__device__ __forceinline__ void fma_if_nonzero(T& sum, T weight, T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {
    asm("{.reg .pred p; setp.neu.f32 p, %1, 0f00000000; @p fma.rn.f32 %0, %1, %2, %0;}"
        : "+f"(sum)
        : "f"(weight), "f"(x));
    return;
  }
#endif
  if (weight != T(0)) {
    sum += weight * x;
  }
}

// STRIDE: channels from token to token if known at compile time, else 0.
template <typename S, typename O, typename T, int VECTOR, int LANES, int STRIDE>
__global__ void __launch_bounds__(FORWARD_THREADS, 2)
    forward_kernel(const Params<S, O, T> params, S* __restrict__ output) {
  const Geometry& g = params.g;
  const int32_t lane = threadIdx.x % LANES, samples = params.samples;
  const int32_t stride = STRIDE > 0 ? STRIDE : g.stride();
  QueryInputs<O, T> q = find_query<LANES>(params);
  const T largest = max_logit<LANES, T>(q.logits, samples, lane);
  pin_in_register(q.valid_sizes);
  pin_in_register(q.reference);
  for (int32_t block = 0; block < g.channels; block += LANES * VECTOR) {
    // Lanes beyond the last channel repeat the last vector, and write nothing.
    const int32_t channel = block + lane * VECTOR;
    const S* left = params.value + static_cast<int64_t>(q.image) * g.tokens * stride +
        q.head * g.channels + min(channel, g.channels - VECTOR);
    const S* right = left + stride;
    const O* offset = params.offsets + 2 * (q.row * samples + lane);
    const O* logit = q.logits + lane;
    pin_in_register(left);
    pin_in_register(right);
    pin_in_register(offset);
    pin_in_register(logit);
    T sum[VECTOR] = {}, exp_sum = 0;
    Pack<S, VECTOR> corner[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      corner[i].clear();
    }
    RawSample<T> next{};
    if (lane < samples) {
      next = read_sample<T>(offset, logit);
    }
#pragma unroll 1
    for (int32_t first = 0; first < samples; first += LANES) {
      const int32_t s = first + lane;
      const RawSample<T> raw = next;
      offset += 2 * LANES;
      logit += LANES;
      if (s + LANES < samples) {
        next = read_sample<T>(offset, logit);
      }
      // Lanes beyond the last sample have weight 0.
      const T exp_logit = s < samples ? exp_shifted(raw.logit, largest) : T(0);
      exp_sum += exp_logit;
      const Sample<T> own = locate(params, q, stride, min(s, samples - 1), raw, q.is_active);
      T own_weight[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        own_weight[i] = own.has[i] ? exp_logit * own.bilinear(i) : T(0);
      }
      const int count = min(LANES, samples - first);
#pragma unroll 1
      for (int source = 0; source < count; ++source) {
        const int32_t offsets[2] = {
            shuffle<LANES>(own.upper, source), shuffle<LANES>(own.lower, source)};
        T weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weight[i] = shuffle<LANES>(own_weight[i], source);
          const S* from = advance(
              STRIDE == 0 && i % 2 ? right : left, offsets[i / 2], params.value_bytes);
          load_if_nonzero(corner[i], from + i % 2 * STRIDE, weight[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          T element[VECTOR];
          unpack(corner[i], element);
#pragma unroll
          for (int k = 0; k < VECTOR; ++k) {
            fma_if_nonzero(sum[k], weight[i], element[k]);
          }
        }
      }
    }
    const T factor = T(1) / sum_over_lanes<LANES>(exp_sum);
    if (q.is_active && channel < g.channels) {
      Pack<S, VECTOR> result;
#pragma unroll
      for (int k = 0; k < VECTOR; ++k) {
        // Without samples inside zero, even if a weight is NaN.
        result.element[k] = static_cast<S>(sum[k] == T(0) ? T(0) : sum[k] * factor);
      }
      result.store(output + q.row * g.channels + channel);
    }
    if (LANES < 32) {
      break; // fewer lanes have one block of channels
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
    auto params = inputs.params<S, O, T>(sizes);
    choose_tiling<S>(sizes.channels, [&](auto vector, auto lanes) {
      constexpr int V = vector.value, N = lanes.value;
      params.schedule = make_schedule(params.g, N, sizes.channels * sizeof(S), FORWARD_THREADS);
      S* out = output.mutable_data_ptr<S>();
      if constexpr (V > 1 && V * N == 32) {
        // 8 heads of 32 channels, as in all papers: half as many addresses.
        if (params.g.stride() == 256) {
          return launch_on_images(forward_kernel<S, O, T, V, N, 256>, params, out);
        }
      }
      launch_on_images(forward_kernel<S, O, T, V, N, 0>, params, out);
    });
  });
  return output;
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CUDA, m) {
  m.impl("deformable_attention", deformable_attention);
}

} // namespace dn_detr
