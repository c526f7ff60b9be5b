// Fused deformable attention on the GPU, backward: the kernel. Only the inputs are kept by the
// forward: softmax and locations are worked out again.
//
// The ways to sum are compiled in files of their own, at the same time: compiling takes long.
#pragma once

#include "deformable_attention.cuh"
#include "ms_deform_attn_gradients.cuh"

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

// STRIDE: 8 * 32 for 8 heads of 32 channels, as in every paper, else 0.
template <typename S, typename O, typename T, int VECTOR, int LANES, int STRIDE, typename Sum>
__global__ void __launch_bounds__(BACKWARD_THREADS, 3) backward_kernel(
    const Problem<S, O, T> problem,
    const S* __restrict__ grad_output,
    Sum grad_value,
    const Gradients<O, T> gradients) {
  grad_value.begin();
  // With fewer than 32 lanes one vector per lane is all there is, and stays in registers.
  constexpr bool is_single = LANES < 32;
  using Number = typename Sum::Number;
  constexpr int UNIT = Sum::unit(VECTOR);
  // Samples whose dot products are summed at once. Adding to 64 bits is much code: fewer.
  constexpr int MOST = sizeof(Number) == 8 ? 2 : 8, TURN = LANES < MOST ? LANES : MOST;
  const Geometry& g = problem.g;
  const int32_t lane = threadIdx.x % LANES, samples = problem.samples;
  const int32_t stride = STRIDE > 0 ? STRIDE : g.stride();
  const int32_t step = STRIDE > 0 ? LANES * UNIT : g.channels / VECTOR * UNIT; // between units
  const int32_t image = problem.first_image + blockIdx.z;
  const Spot spot = find_spot<LANES>(problem.order);
  const int64_t query = static_cast<int64_t>(image) * g.queries + spot.query;
  const int64_t row = query * g.heads + spot.head;
  const T* valid_sizes = problem.valid_sizes + static_cast<int64_t>(image) * 2 * g.levels;
  const T* reference =
      problem.reference + query * (problem.reference_levels * problem.coordinates);
  const O* logits = problem.logits + row * samples;
  const T largest = largest_logit<LANES, T>(logits, samples, lane);
  const T factor = T(1) / sum_of_powers<LANES>(logits, samples, lane, largest);

  // Lanes beyond the last channel have gradients of zero for the last one.
  const int32_t channel = min(lane * VECTOR, g.channels - VECTOR);
  const bool has_channel = spot.exists && lane * VECTOR < g.channels;
  const int64_t base = static_cast<int64_t>(image) * g.tokens * stride + spot.head * g.channels;
  const S* values = problem.value + base + channel;
  Number* sums = grad_value.sums + base + channel / VECTOR * UNIT;
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
          const bool here = STRIDE > 0 || c + lane * VECTOR < g.channels;
          if (!is_single) {
            pack.clear();
            if (spot.exists && here) {
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
            grad_value.add(
                to_here + i % 2 * stride + shift / VECTOR * UNIT, step, here ? share[i] : T(0),
                grad);
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

} // namespace

// What is given and asked for, all of it aligned and checked.
struct DeformableBackward {
  const DeformableSizes& sizes;
  const DeformableInputs& inputs;
  at::Tensor grad_output;
  at::Tensor grad_offsets, grad_logits, grad_weights;
  at::Tensor grad_reference; // undefined where none is wanted, see `Gradients`
  at::Tensor scale; // of fixed point, else undefined
};

// Fills the gradients, and returns that of the values; defined in the files that compile them.
at::Tensor sum_in_floating_point(const DeformableBackward& call);
at::Tensor sum_in_fixed_point(const DeformableBackward& call);

// make_sum(numbers, T()) -> FloatingSum<T> or FixedPointSum<T>.
template <typename F>
at::Tensor sum_gradients(const DeformableBackward& call, at::ScalarType number, const F& make_sum) {
  const at::Tensor &value = call.inputs.value, &reference = call.grad_reference;
  const at::Tensor sums =
      room_for(value.sizes(), call.grad_weights.options().dtype(number)).zero_();
  at::Tensor grad_value;
  choose_types(value, call.inputs.offsets, [&](auto s, auto o, auto t) {
    using S = decltype(s);
    using O = decltype(o);
    using T = decltype(t);
    auto problem = call.inputs.problem<S, O, T>(call.sizes);
    const Gradients<O, T> gradients{
        reference.defined() ? reference.mutable_data_ptr<T>() : nullptr,
        call.grad_offsets.mutable_data_ptr<O>(), call.grad_weights.mutable_data_ptr<T>(),
        call.grad_logits.mutable_data_ptr<O>()};
    const S* grads = call.grad_output.const_data_ptr<S>();
    const auto sum = make_sum(sums, t);
    using Sum = std::decay_t<decltype(sum)>;
    problem.size_of_sum = sizeof(typename Sum::Number);
    choose_tiling<S>(call.sizes.channels, [&](auto vector, auto lanes) {
      constexpr int V = vector.value, N = lanes.value;
      problem.order = order_of(problem.g, N, call.sizes.channels * sizeof(S), BACKWARD_THREADS);
      const auto launch = [&](auto stride) {
        launch_on_images(
            backward_kernel<S, O, T, V, N, stride.value, Sum>, problem, grads, sum, gradients);
      };
      constexpr int usual = V > 1 && V * N == 32 ? 8 * 32 : 0; // stride
      if (usual > 0 && problem.g.channels == 32 && problem.g.heads == 8) {
        launch(Number<usual>());
      } else {
        launch(Number<0>());
      }
      grad_value = finish<S, T, V>(sum, sums, problem.g, value.scalar_type());
    });
  });
  return grad_value;
}

} // namespace dn_detr
