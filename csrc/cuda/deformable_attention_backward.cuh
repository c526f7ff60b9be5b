// Backward kernel of the fused deformable attention on the GPU. Forward saves only its inputs:
// softmax and positions are recomputed.
//
// Each way to accumulate is compiled in its own file: compilation is slow, and files are compiled
// in parallel.
#pragma once

#include "deformable_attention.cuh"
#include "ms_deform_attn_gradients.cuh"

namespace dn_detr {

namespace {

constexpr int BACKWARD_THREADS = 256;

// Outputs other than the gradient of the values.
template <typename O, typename T>
struct Gradients {
  T* reference; // [B, Q, H, 1, coordinates] or, of every level, [B, Q, H, levels * P, coordinates]
  O* offsets; // [B, Q, H, levels, P, 2]
  T* weights; // [B, Q, H, levels * P], scratch for the gradient of the logits; may be logits
  O* logits; // [B, Q, H, levels * P]
};

// Predicated, see load_if_nonzero of the forward pass.
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
__device__ __forceinline__ void fma_if(bool is_used, T& sum, T x, T y) {
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

// Sums the four dot products of the samples [j, j + COUNT) over lanes; a lane gets those of sample
// j + lane % COUNT. `dots(j, result)` computes a lane's part for one sample. Recursive halving
// keeps few partial sums in registers.
template <int COUNT, typename T, typename F>
__device__ __forceinline__ void reduce_scatter(int32_t lane, int j, const F& dots, T (&result)[4]) {
  if constexpr (COUNT == 1) {
    dots(j, result);
  } else {
    constexpr int half = COUNT / 2;
    T lower[4] = {}, upper[4] = {};
    reduce_scatter<half>(lane, j, dots, lower);
    reduce_scatter<half>(lane, j + half, dots, upper);
    const bool is_upper = lane & half;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T received = __shfl_xor_sync(ALL_LANES, is_upper ? lower[i] : upper[i], half);
      result[i] = (is_upper ? upper[i] : lower[i]) + received;
    }
  }
}

// A located sample, as its lane passes it on to the others of its group.
template <typename T>
struct SampleCorners {
  int32_t upper, lower; // channels from the image's first one to corners 0 and 2
  int has; // bits of the corners that exist
  T weight[4]; // attention weight times bilinear weight

  __device__ __forceinline__ SampleCorners() = default;

  __device__ __forceinline__ SampleCorners(const Sample<T>& sample, T attention)
      : upper(sample.upper), lower(sample.lower), has(0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weight[i] = sample.has[i] ? attention * sample.bilinear(i) : T(0);
      has |= sample.has[i] ? 1 << i : 0;
    }
  }

  template <int LANES>
  __device__ __forceinline__ SampleCorners of_lane(int source) const {
    SampleCorners other;
    other.upper = shuffle<LANES>(upper, source);
    other.lower = shuffle<LANES>(lower, source);
    other.has = shuffle<LANES>(has, source);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      other.weight[i] = shuffle<LANES>(weight[i], source);
    }
    return other;
  }
};

// The channels of a lane. With fewer than 32 lanes a lane has one vector, whose gradient stays in
// registers; 32 lanes loop over blocks of channels.
template <typename S, typename T, int VECTOR, int LANES, int STRIDE, typename Sum>
struct LaneChannels {
  using Accumulator = typename Sum::Accumulator;
  static constexpr int UNIT = Sum::unit(VECTOR);

  int32_t channels, stride, channel; // channel: the first; lanes beyond the last repeat the last
  int32_t step; // between units of the sums
  bool is_active;
  const S *values, *grad_output;
  Accumulator* sums;
  T grad[VECTOR]; // of the output, zero beyond the last channel
  Pack<S, VECTOR> corner[4];

  __device__ __forceinline__ void load_grad(int32_t shift, bool is_used) {
    Pack<S, VECTOR> pack;
    pack.clear();
    if (is_used) {
      pack.load(grad_output + shift);
    }
    unpack(pack, grad);
  }

  // Adds the gradient of the values at the corners of a sample, and to `dots` the products of
  // grad_output and each corner.
  template <typename P>
  __device__ __forceinline__ void visit(
      const P& params,
      const Sum& sum,
      const SampleCorners<T>& sample,
      T (&dots)[4]) {
    const int32_t offsets[2] = {sample.upper, sample.lower};
    const int32_t own_channel = threadIdx.x % LANES * VECTOR;
    for (int32_t c = 0; c < channels; c += LANES * VECTOR) {
      const int32_t shift = LANES < 32 ? 0 : min(c, channels - VECTOR - channel);
      const bool has_channel = STRIDE > 0 || c + own_channel < channels;
      if (LANES == 32) {
        load_grad(shift, is_active && has_channel);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const S* from = advance(values, offsets[i / 2], params.value_bytes);
        load_if(sample.has >> i & 1, corner[i], from + i % 2 * stride + shift);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Accumulator* to = advance(sums, offsets[i / 2], params.sum_bytes);
        sum.add(
            to + i % 2 * stride + shift / VECTOR * UNIT, step,
            has_channel ? sample.weight[i] : T(0), grad);
        T element[VECTOR];
        unpack(corner[i], element);
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) {
          fma_if(sample.has >> i & 1, dots[i], grad[k], element[k]);
        }
      }
      if (LANES < 32) {
        break;
      }
    }
  }
};

// Writes the gradients of the offset, weight and reference of a sample; grad_reference sums the
// last over the samples of a lane. sampled: gradient of the weight; grad_x, grad_y: of the
// position.
template <typename S, typename O, typename T>
__device__ __forceinline__ void write_sample_gradients(
    const Params<S, O, T>& params,
    const Gradients<O, T>& gradients,
    const Sample<T>& sample,
    const RawSample<T>& raw,
    int64_t index,
    T sampled,
    T grad_x,
    T grad_y,
    T (&grad_reference)[4]) {
  struct alignas(2 * sizeof(O)) OffsetPair {
    O x, y;
  };
  const T offset_x = sample.is_inside ? grad_x * sample.slope_x : T(0);
  const T offset_y = sample.is_inside ? grad_y * sample.slope_y : T(0);
  *reinterpret_cast<OffsetPair*>(gradients.offsets + 2 * index) = {
      static_cast<O>(offset_x), static_cast<O>(offset_y)};
  gradients.weights[index] = sampled;
  if (gradients.reference == nullptr) {
    return;
  }
  const T to_size = params.half_by_points;
  const T by_coordinate[4] = {
      grad_x * sample.valid.x, grad_y * sample.valid.y,
      sample.is_inside ? grad_x * sample.valid.x * raw.offset_x * to_size : T(0),
      sample.is_inside ? grad_y * sample.valid.y * raw.offset_y * to_size : T(0)};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    grad_reference[i] += by_coordinate[i];
    if (params.reference_levels > 1 && i < params.coordinates) {
      gradients.reference[index * params.coordinates + i] = by_coordinate[i];
    }
  }
}

// Writes the gradients that are sums over the samples of a query and head. expected: this lane's
// part of the mean gradient of the weights.
template <int LANES, typename S, typename O, typename T>
__device__ __forceinline__ void write_query_gradients(
    const Params<S, O, T>& params,
    const Gradients<O, T>& gradients,
    const QueryInputs<O, T>& q,
    int32_t lane,
    int32_t samples,
    T largest,
    T factor,
    T expected,
    const T (&grad_reference)[4]) {
  const int64_t first = q.row * samples;
  expected = sum_over_lanes<LANES>(expected);
  for (int32_t s = lane; s < samples && q.is_active; s += LANES) {
    const T weight = exp_shifted(static_cast<T>(q.logits[s]), largest) * factor;
    gradients.logits[first + s] =
        static_cast<O>(weight * (gradients.weights[first + s] - expected));
  }
  if (gradients.reference != nullptr && params.reference_levels == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T sum = sum_over_lanes<LANES>(grad_reference[i]);
      if (lane == 0 && i < params.coordinates && q.is_active) {
        gradients.reference[q.row * params.coordinates + i] = sum;
      }
    }
  }
}

// STRIDE: 8 * 32 for 8 heads of 32 channels, as in all papers, else 0.
template <typename S, typename O, typename T, int VECTOR, int LANES, int STRIDE, typename Sum>
__global__ void __launch_bounds__(BACKWARD_THREADS, 3) backward_kernel(
    const Params<S, O, T> params,
    const S* __restrict__ grad_output,
    Sum grad_value,
    const Gradients<O, T> gradients) {
  grad_value.begin();
  // Samples whose dot products are reduced together; 64-bit accumulation needs more code per
  // sample.
  constexpr int MOST = sizeof(typename Sum::Accumulator) == 8 ? 2 : 8;
  constexpr int CHUNK = LANES < MOST ? LANES : MOST;
  const Geometry& g = params.g;
  const int32_t lane = threadIdx.x % LANES, samples = params.samples;
  QueryInputs<O, T> q = find_query<LANES>(params);
  const T largest = max_logit<LANES, T>(q.logits, samples, lane);
  const T factor = T(1) / sum_of_exps<LANES>(q.logits, samples, lane, largest);

  LaneChannels<S, T, VECTOR, LANES, STRIDE, Sum> own;
  own.channels = g.channels;
  own.stride = STRIDE > 0 ? STRIDE : g.stride();
  own.step = (STRIDE > 0 ? LANES : g.channels / VECTOR) * own.UNIT;
  own.channel = min(lane * VECTOR, g.channels - VECTOR);
  own.is_active = q.is_active;
  const int64_t base =
      static_cast<int64_t>(q.image) * g.tokens * own.stride + q.head * g.channels;
  own.values = params.value + base + own.channel;
  own.sums = grad_value.sums + base + own.channel / VECTOR * own.UNIT;
  own.grad_output = grad_output + q.row * g.channels + own.channel;
  own.load_grad(0, q.is_active && lane * VECTOR < g.channels);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    own.corner[i].clear();
  }
  int64_t index = q.row * samples + lane;
  pin_in_register(q.valid_sizes);
  pin_in_register(q.reference);
  pin_in_register(own.values);
  pin_in_register(own.sums);

  T expected = 0; // sum of weight times its gradient over this lane's samples
  T grad_reference[4] = {};
#pragma unroll 1
  for (int32_t first = 0; first < samples; first += LANES, index += LANES) {
    const int32_t s = first + lane;
    const bool exists = q.is_active && s < samples;
    RawSample<T> raw{};
    if (s < samples) {
      raw = read_sample<T>(params.offsets + 2 * index, params.logits + index);
    }
    const Sample<T> sample = locate(params, q, own.stride, min(s, samples - 1), raw, exists);
    const T weight = exists ? exp_shifted(raw.logit, largest) * factor : T(0);
    const SampleCorners<T> corners(sample, weight);
    T dot[4] = {}; // of grad_output and each corner
#pragma unroll 1
    for (int chunk = 0; chunk < LANES && first + chunk < samples; chunk += CHUNK) {
      T dots[4] = {};
      reduce_scatter<CHUNK>(
          lane, chunk,
          [&](int source, T(&result)[4]) {
            own.visit(params, grad_value, corners.template of_lane<LANES>(source), result);
          },
          dots);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int distance = CHUNK; distance < LANES; distance *= 2) {
          dots[i] += __shfl_xor_sync(ALL_LANES, dots[i], distance);
        }
        dot[i] = CHUNK == LANES || lane / CHUNK * CHUNK == chunk ? dots[i] : dot[i];
      }
    }
    const T upper = dot[0] + sample.x * (dot[1] - dot[0]);
    const T lower = dot[2] + sample.x * (dot[3] - dot[2]);
    const T sampled = upper + sample.y * (lower - upper);
    const T along_x = dot[1] - dot[0] + sample.y * (dot[3] - dot[2] - (dot[1] - dot[0]));
    // Samples outside get no gradient, even if their weight is NaN.
    const T grad_x = sample.is_inside ? weight * along_x : T(0);
    const T grad_y = sample.is_inside ? weight * (lower - upper) : T(0);
    expected += weight * sampled;
    if (exists) {
      write_sample_gradients(
          params, gradients, sample, raw, index, sampled, grad_x, grad_y, grad_reference);
    }
  }
  write_query_gradients<LANES>(
      params, gradients, q, lane, samples, largest, factor, expected, grad_reference);
}

} // namespace

// Inputs and outputs of a backward pass, checked and aligned.
struct DeformableBackward {
  const DeformableSizes& sizes;
  const DeformableInputs& inputs;
  at::Tensor grad_output;
  at::Tensor grad_offsets, grad_logits, grad_weights;
  at::Tensor grad_reference; // undefined if not needed, see `Gradients`
  at::Tensor scale; // of fixed point, else undefined
};

// Write the gradients and return that of the values; each is defined in its own file.
at::Tensor sum_in_floating_point(const DeformableBackward& call);
at::Tensor sum_in_fixed_point(const DeformableBackward& call);

// make_sum(sums, T()) -> FloatingSum<T> or FixedPointSum<T>.
template <typename F>
at::Tensor sum_gradients(const DeformableBackward& call, at::ScalarType dtype, const F& make_sum) {
  const at::Tensor &value = call.inputs.value, &reference = call.grad_reference;
  const at::Tensor sums =
      empty_aligned(value.sizes(), call.grad_weights.options().dtype(dtype)).zero_();
  at::Tensor grad_value;
  choose_types(value, call.inputs.offsets, [&](auto s, auto o, auto t) {
    using S = decltype(s);
    using O = decltype(o);
    using T = decltype(t);
    auto params = call.inputs.params<S, O, T>(call.sizes);
    const Gradients<O, T> gradients{
        reference.defined() ? reference.mutable_data_ptr<T>() : nullptr,
        call.grad_offsets.mutable_data_ptr<O>(), call.grad_weights.mutable_data_ptr<T>(),
        call.grad_logits.mutable_data_ptr<O>()};
    const S* grads = call.grad_output.const_data_ptr<S>();
    const auto sum = make_sum(sums, t);
    using Sum = std::decay_t<decltype(sum)>;
    params.sum_bytes = sizeof(typename Sum::Accumulator);
    choose_tiling<S>(call.sizes.channels, [&](auto vector, auto lanes) {
      constexpr int V = vector.value, N = lanes.value;
      params.schedule =
          make_schedule(params.g, N, call.sizes.channels * sizeof(S), BACKWARD_THREADS);
      const auto launch = [&](auto stride) {
        launch_on_images(
            backward_kernel<S, O, T, V, N, stride.value, Sum>, params, grads, sum, gradients);
      };
      constexpr int usual = V > 1 && V * N == 32 ? 8 * 32 : 0; // stride
      if (usual > 0 && params.g.channels == 32 && params.g.heads == 8) {
        launch(Number<usual>());
      } else {
        launch(Number<0>());
      }
      grad_value = finish<S, T, V>(sum, sums, params.g, value.scalar_type());
    });
  });
  return grad_value;
}

} // namespace dn_detr
