// Fused deformable attention on the GPU, backward. Only the inputs are kept by the forward: softmax
// and locations are worked out again.

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "deformable_attention.cuh"
#include "ms_deform_attn_sums.cuh"

namespace dn_detr {
namespace {

constexpr int BACKWARD_THREADS = 256;

// Where the gradients go, beside that of the values.
template <typename O, typename T>
struct Gradients {
  T* reference; // [B, Q, H, 1, coordinates] or, of every level, [B, Q, H, levels * P, coordinates]
  O* offsets; // [B, Q, H, levels, P, 2]
  T* weights; // [B, Q, H, levels * P], room for what logits need at the end; may be logits
  O* logits; // [B, Q, H, levels * P]
};

// Where a corner is not used what was read before stays in its place; without branches, see forward.
template <typename S, int VECTOR>
__device__ __forceinline__ void load_if(bool is_used, Pack<S, VECTOR>& to, const S* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(to) == 16) {
    uint32_t* word = reinterpret_cast<uint32_t*>(&to);
    asm("{.reg .pred p; setp.ne.s32 p, %5, 0;\n\t"
        "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "+r"(word[0]), "+r"(word[1]), "+r"(word[2]), "+r"(word[3])
        : "l"(from), "r"(static_cast<int>(is_used)));
    return;
  }
#endif
  if (is_used) {
    to.load(from);
  }
}

template <typename T>
__device__ __forceinline__ void multiply_add_if(bool is_used, T& sum, T x, T y) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {
    asm("{.reg .pred p; setp.ne.s32 p, %3, 0; @p fma.rn.f32 %0, %1, %2, %0;}"
        : "+f"(sum)
        : "f"(x), "f"(y), "r"(static_cast<int>(is_used)));
    return;
  }
#endif
  if (is_used) {
    sum += x * y;
  }
}

// The four dot products of COUNT samples from number j on, summed over lanes so that a lane gets
// those of sample j + lane % COUNT. `dots(j, result)` gives a lane's own part of one sample. By
// halves: each gives away the sums of one half, and no more than a few are held at a time.
template <int COUNT, typename T, typename F>
__device__ __forceinline__ void deal_out(int32_t lane, int j, const F& dots, T (&result)[4]) {
  if constexpr (COUNT == 1) {
    dots(j, result);
  } else {
    constexpr int half = COUNT / 2;
    T lower[4] = {}, upper[4] = {};
    deal_out<half>(lane, j, dots, lower);
    deal_out<half>(lane, j + half, dots, upper);
    const bool is_upper = lane & half;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T given = __shfl_xor_sync(ALL_LANES, is_upper ? lower[i] : upper[i], half);
      result[i] = (is_upper ? upper[i] : lower[i]) + given;
    }
  }
}

template <typename S, typename O, typename T, int VECTOR, int LANES, int STRIDE, typename Sum>
__global__ void __launch_bounds__(BACKWARD_THREADS, 3) backward_kernel(
    const Problem<S, O, T> problem,
    const S* __restrict__ grad_output,
    const Sum grad_value,
    const Gradients<O, T> gradients) {
  // With fewer than 32 lanes one vector per lane is all there is, and stays in registers.
  constexpr bool is_single = LANES < 32;
  constexpr int TURN = LANES < 8 ? LANES : 8;
  using Number = typename Sum::Number;
  const Geometry& g = problem.g;
  const int32_t lane = threadIdx.x % LANES, samples = problem.samples;
  const int32_t stride = STRIDE > 0 ? STRIDE : g.stride();
  const int32_t image = problem.first_image + blockIdx.z;
  const Spot spot = find_spot<LANES>(problem.order);
  const int64_t query = static_cast<int64_t>(image) * g.queries + spot.query;
  const int64_t row = query * g.heads + spot.head;
  const T* valid_sizes = problem.valid_sizes + 2 * image * g.levels;
  const T* reference =
      problem.reference + query * (problem.reference_levels * problem.coordinates);
  const O* logits = problem.logits + row * samples;
  const T largest = largest_logit<LANES, T>(logits, samples, lane);
  const T factor = T(1) / sum_of_powers<LANES>(logits, samples, lane, largest);

  // Lanes beyond the last channel have gradients of zero for the last one.
  const int32_t channel = min(lane * VECTOR, g.channels - VECTOR);
  const bool has_channel = spot.exists && lane * VECTOR < g.channels;
  const int64_t base =
      static_cast<int64_t>(image) * g.tokens * stride + spot.head * g.channels + channel;
  const S* values = problem.value + base;
  Number* sums = grad_value.sums + base;
  const S* grads = grad_output + row * g.channels + channel;
  Pack<S, VECTOR> pack, corner[4];
  T grad[VECTOR];
  pack.clear();
  if (has_channel) {
    pack.load(grads);
  }
  unpack(pack, grad);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    corner[i].clear();
  }
  int64_t at_sample = row * samples + lane;
  keep(valid_sizes);
  keep(reference);
  keep(values);
  keep(sums);

  T expected = 0; // sum of weight times its gradient, this lane's samples
  T grad_reference[4] = {};
#pragma unroll 1
  for (int32_t first = 0; first < samples; first += LANES, at_sample += LANES) {
    const int32_t s = first + lane;
    const bool exists = spot.exists && s < samples;
    Raw<T> raw{};
    if (s < samples) {
      raw = read_sample<T>(problem.offsets + 2 * at_sample, problem.logits + at_sample);
    }
    const Sample<T> own =
        locate(problem, valid_sizes, reference, image, stride, min(s, samples - 1), raw, exists);
    const T weight = exists ? power_of(raw.logit, largest) * factor : T(0);
    T own_share[4], dot[4] = {}; // dot: of grad_output with each corner
    int own_has = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      own_share[i] = own.has[i] ? weight * own.bilinear(i) : T(0);
      own_has |= own.has[i] ? 1 << i : 0;
    }
#pragma unroll 1
    for (int turn = 0; turn < LANES && first + turn < samples; turn += TURN) {
      T sums_of_turn[4] = {};
      const auto dots_of = [&](int from, T(&dots)[4]) {
        const int32_t at[2] = {tell<LANES>(own.upper, from), tell<LANES>(own.lower, from)};
        const int has = tell<LANES>(own_has, from);
        T share[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          share[i] = tell<LANES>(own_share[i], from);
        }
        for (int32_t c = 0; c < g.channels; c += LANES * VECTOR) {
          // Of further blocks, which only 32 lanes have, some lanes have no channels either.
          const int32_t shift = is_single ? 0 : min(c, g.channels - VECTOR - channel);
          if (!is_single) {
            pack.clear();
            if (spot.exists && c + lane * VECTOR < g.channels) {
              pack.load(grads + shift);
            }
            unpack(pack, grad);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const S* from_here = advance(values, at[i / 2], problem.size_of_value);
            load_if(has >> i & 1, corner[i], from_here + i % 2 * stride + shift);
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            Number* to_here = advance(sums, at[i / 2], problem.size_of_sum);
            grad_value.add(to_here + i % 2 * stride + shift, share[i], grad);
            T number[VECTOR];
            unpack(corner[i], number);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) {
              multiply_add_if(has >> i & 1, dots[i], grad[k], number[k]);
            }
          }
          if (is_single) {
            break;
          }
        }
      };
      deal_out<TURN>(lane, turn, dots_of, sums_of_turn);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int distance = TURN; distance < LANES; distance *= 2) {
          sums_of_turn[i] += __shfl_xor_sync(ALL_LANES, sums_of_turn[i], distance);
        }
        dot[i] = TURN == LANES || lane / TURN * TURN == turn ? sums_of_turn[i] : dot[i];
      }
    }
    const T upper = dot[0] + own.x * (dot[1] - dot[0]);
    const T lower = dot[2] + own.x * (dot[3] - dot[2]);
    const T sampled = upper + own.y * (lower - upper);
    const T along_x = dot[1] - dot[0] + own.y * (dot[3] - dot[2] - (dot[1] - dot[0]));
    // A sample outside gets no gradient, even if its weight is NaN.
    const T grad_x = own.is_inside ? weight * along_x : T(0);
    const T grad_y = own.is_inside ? weight * (lower - upper) : T(0);
    expected += weight * sampled;
    if (!exists) {
      continue;
    }
    struct alignas(2 * sizeof(O)) Two {
      O x, y;
    };
    const T offset_x = own.is_inside ? grad_x * own.slope_x : T(0);
    const T offset_y = own.is_inside ? grad_y * own.slope_y : T(0);
    *reinterpret_cast<Two*>(gradients.offsets + 2 * at_sample) = {
        static_cast<O>(offset_x), static_cast<O>(offset_y)};
    gradients.weights[at_sample] = sampled;
    if (gradients.reference != nullptr) {
      const T to_size = problem.half_by_points;
      const T by_coordinate[4] = {
          grad_x * own.valid.x, grad_y * own.valid.y,
          own.is_inside ? grad_x * own.valid.x * raw.offset_x * to_size : T(0),
          own.is_inside ? grad_y * own.valid.y * raw.offset_y * to_size : T(0)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        grad_reference[i] += by_coordinate[i];
        if (problem.reference_levels > 1 && i < problem.coordinates) {
          gradients.reference[at_sample * problem.coordinates + i] = by_coordinate[i];
        }
      }
    }
  }

  expected = sum_of_lanes<LANES>(expected);
  at_sample = row * samples;
  for (int32_t s = lane; s < samples && spot.exists; s += LANES) {
    const T weight = power_of(static_cast<T>(logits[s]), largest) * factor;
    gradients.logits[at_sample + s] =
        static_cast<O>(weight * (gradients.weights[at_sample + s] - expected));
  }
  if (gradients.reference != nullptr && problem.reference_levels == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T sum = sum_of_lanes<LANES>(grad_reference[i]);
      if (lane == 0 && i < problem.coordinates && spot.exists) {
        gradients.reference[row * problem.coordinates + i] = sum;
      }
    }
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> deformable_attention_backward(
    const at::Tensor& grad_output_,
    const at::Tensor& value,
    at::IntArrayRef spatial_shapes,
    const at::Tensor& valid_sizes,
    const at::Tensor& reference,
    const at::Tensor& offsets,
    const at::Tensor& logits,
    const std::optional<at::Tensor>& padding,
    bool needs_reference) {
  const DeformableSizes sizes = check_deformable_attention(
      value, spatial_shapes, valid_sizes, reference, offsets, logits, padding);
  check_grad_output(grad_output_, value, sizes);
  const c10::cuda::CUDAGuard guard(value.device());
  const bool is_fixed = at::globalContext().deterministicAlgorithms();
  const auto options = reference.options();
  auto sums = at::zeros(value.sizes(), is_fixed ? options.dtype(at::kLong) : options);
  auto grad_offsets = at::empty(offsets.sizes(), offsets.options());
  auto grad_logits = at::empty(logits.sizes(), logits.options());
  if (grad_output_.numel() == 0 || logits.numel() == 0) {
    return {sums.to(value.scalar_type()),
            needs_reference ? at::zeros(reference.sizes(), options) : at::empty({0}, options),
            grad_offsets.zero_(), grad_logits.zero_()};
  }
  const DeformableInputs inputs{
      aligned(value), aligned(valid_sizes), aligned(reference), aligned(offsets), aligned(logits),
      padding ? padding->contiguous() : at::Tensor()};
  const auto grad_output = aligned(grad_output_);
  // The gradients of weights are wanted in full precision until those of the logits are known.
  const auto grad_weights =
      grad_logits.scalar_type() == options.dtype().toScalarType()
          ? grad_logits
          : at::empty(logits.sizes(), options);
  const int64_t parts = sizes.reference_levels == 1 ? 1 : sizes.samples();
  const auto reference_parts = needs_reference
      ? at::empty({sizes.batch, sizes.queries, sizes.heads, parts, sizes.coordinates}, options)
      : at::Tensor();
  // The weights of a query and head add up to 1, and so does what they count in any one cell.
  const auto scale = is_fixed ? scale_of(
                                    grad_output.abs().amax().to(at::kDouble) + 0 * logits.amax(),
                                    sizes.queries, reference.scalar_type())
                              : at::Tensor();
  choose_types(value, offsets, [&](auto s, auto o, auto t) {
    using S = decltype(s);
    using O = decltype(o);
    using T = decltype(t);
    auto problem = inputs.problem<S, O, T>(sizes);
    const Gradients<O, T> gradients{
        needs_reference ? reference_parts.mutable_data_ptr<T>() : nullptr,
        grad_offsets.mutable_data_ptr<O>(), grad_weights.mutable_data_ptr<T>(),
        grad_logits.mutable_data_ptr<O>()};
    const S* grads = grad_output.const_data_ptr<S>();
    choose_tiling<S>(sizes.channels, [&](auto vector, auto lanes) {
      constexpr int V = vector.value, N = lanes.value;
      problem.order = order_of(problem.g, N, sizes.channels * sizeof(S), BACKWARD_THREADS);
      const auto launch = [&](auto sum) {
        using Sum = decltype(sum);
        problem.size_of_sum = sizeof(typename Sum::Number);
        if constexpr (V > 1 && V * N == 32 && std::is_same_v<Sum, FloatingSum<T>>) {
          if (problem.g.stride() == 256) { // see forward
            return launch_on_images(
                backward_kernel<S, O, T, V, N, 256, Sum>, problem, grads, sum, gradients);
          }
        }
        launch_on_images(backward_kernel<S, O, T, V, N, 0, Sum>, problem, grads, sum, gradients);
      };
      if (is_fixed) {
        launch(FixedPointSum<T>{sums.mutable_data_ptr<int64_t>(), scale.const_data_ptr<T>()});
      } else {
        launch(FloatingSum<T>{sums.mutable_data_ptr<T>()});
      }
    });
  });
  const auto grad_value = is_fixed ? sums.to(reference.scalar_type()) / scale : sums;
  at::Tensor grad_reference = at::empty({0}, options);
  if (needs_reference && sizes.reference_levels == 1) {
    grad_reference = reference_parts.sum({2, 3});
  } else if (needs_reference) {
    const auto levels = static_cast<int64_t>(sizes.levels.size());
    grad_reference = reference_parts.unflatten(3, {levels, sizes.points}).sum({2, 4});
  }
  return {grad_value.to(value.scalar_type()), grad_reference, grad_offsets, grad_logits};
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CUDA, m) {
  m.impl("deformable_attention_backward", deformable_attention_backward);
}

} // namespace dn_detr
