// All assignment problems of a batch on the GPU, a thread block for each, and the check for
// non-finite values.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "../assign_objects.h"
#include "../assignment_problem.h"

namespace dn_detr {
namespace {

constexpr int WARP = 32, MOST_THREADS = 1024;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The threads of a block.
struct BlockTeam {
  Candidate* shared; // [warps]

  __device__ int32_t rank() const { return static_cast<int32_t>(threadIdx.x); }
  __device__ int32_t size() const { return static_cast<int32_t>(blockDim.x); }
  __device__ int32_t lane() const { return rank() % WARP; }
  __device__ int32_t lanes() const { return WARP; }
  __device__ int32_t warp() const { return rank() / WARP; }
  __device__ int32_t warps() const { return size() / WARP; }
  __device__ void sync() const { __syncthreads(); }
  __device__ bool any(bool own) const { return __syncthreads_or(own) != 0; }

  __device__ Candidate least_of_warp(Candidate own) const {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
      const Candidate other{
          __shfl_xor_sync(ALL_LANES, own.cost, distance),
          __shfl_xor_sync(ALL_LANES, own.index, distance)};
      own = lesser(own, other);
    }
    return own;
  }

  __device__ Candidate least(Candidate own) const {
    own = least_of_warp(own);
    if (lane() == 0) {
      shared[warp()] = own;
    }
    __syncthreads();
    for (int32_t i = 0; i < warps(); ++i) {
      own = lesser(own, shared[i]);
    }
    __syncthreads(); // before `shared` is written again
    return own;
  }

  __device__ int32_t sum(int32_t own) const {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
      own += __shfl_xor_sync(ALL_LANES, own, distance);
    }
    if (lane() == 0) {
      shared[warp()].index = own;
    }
    __syncthreads();
    own = 0;
    for (int32_t i = 0; i < warps(); ++i) {
      own += shared[i].index;
    }
    __syncthreads();
    return own;
  }
};

template <typename T>
__global__ void __launch_bounds__(MOST_THREADS) solve_kernel(const ProblemSet<T> problems) {
  __shared__ Candidate shared[MOST_THREADS / WARP];
  solve_problem(BlockTeam{shared}, problems, static_cast<int32_t>(blockIdx.x));
}

// With many slots, reading the costs takes the most time.
int threads_for(int64_t group_slots) {
  return group_slots <= 512 ? 128 : group_slots <= 2048 ? 256 : MOST_THREADS;
}

template <typename T>
void solve_segment(const MatchSegment& segment, const at::Tensor& image_of, int64_t batch) {
  const int64_t problems = segment.problems(batch), objects = image_of.numel();
  check_product(
      "L * num_groups * T * matches_per_object",
      {segment.layers, segment.groups, objects, segment.matches_per_object}, 48);
  const int64_t workspace = segment.layers * segment.groups * objects * segment.matches_per_object;
  if (problems == 0 || objects == 0) {
    return;
  }
  ProblemSet<T> p{};
  p.cost = segment.cost.const_data_ptr<T>();
  p.image_of = image_of.const_data_ptr<int64_t>();
  p.is_empty = segment.is_empty ? segment.is_empty->const_data_ptr<bool>() : nullptr;
  p.object_of = segment.object_of.mutable_data_ptr<int64_t>();
  p.is_bad = segment.is_bad.mutable_data_ptr<bool>();
  p.batch = static_cast<int32_t>(batch);
  p.objects = static_cast<int32_t>(objects);
  p.slots = static_cast<int32_t>(segment.cost.size(2));
  p.groups = static_cast<int32_t>(segment.groups);
  p.matches_per_object = static_cast<int32_t>(segment.matches_per_object);
  p.workspace = workspace;
  const auto integer = image_of.options().dtype(at::kInt);
  const at::Tensor doubles = at::empty(
      {Workspace::NUM_DOUBLES * workspace}, image_of.options().dtype(at::kDouble));
  const at::Tensor integers = at::empty({(Workspace::NUM_INTEGERS + 1) * workspace}, integer);
  const at::Tensor closed = at::empty({problems * p.words()}, integer);
  p.doubles = doubles.mutable_data_ptr<double>();
  p.integers = integers.mutable_data_ptr<int32_t>();
  p.open_slots = p.integers + Workspace::NUM_INTEGERS * workspace;
  p.closed = reinterpret_cast<uint32_t*>(closed.mutable_data_ptr<int32_t>());
  solve_kernel<T>
      <<<static_cast<unsigned>(problems), threads_for(segment.group_slots), 0,
         c10::cuda::getCurrentCUDAStream()>>>(p);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> assign_objects(
    at::TensorList costs,
    const at::Tensor& image_of_,
    int64_t batch,
    const OptionalTensors& is_empty,
    at::IntArrayRef num_groups,
    at::IntArrayRef matches_per_object) {
  const c10::cuda::CUDAGuard guard(image_of_.device());
  const auto segments =
      check_assign_objects(costs, image_of_, batch, is_empty, num_groups, matches_per_object);
  const auto image_of = image_of_.contiguous();
  for (const MatchSegment& segment : segments) {
    AT_DISPATCH_FLOATING_TYPES(segment.cost.scalar_type(), "assign_objects", [&] {
      solve_segment<scalar_t>(segment, image_of, batch);
    });
  }
  return results(segments);
}

constexpr int SEARCH_THREADS = 256, SEARCH_STEPS = 16;

// blockIdx: part of the image, image, layer. strides: of layer and image.
template <typename T>
__global__ void __launch_bounds__(SEARCH_THREADS) search_kernel(
    const T* values,
    int64_t layer_stride,
    int64_t image_stride,
    int64_t slots,
    int64_t width,
    const bool* is_empty,
    bool* found) {
  const int64_t b = blockIdx.y, l = blockIdx.z, n = slots * width;
  const T* image = values + l * layer_stride + b * image_stride;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * SEARCH_THREADS * SEARCH_STEPS;
#pragma unroll 4
  for (int step = 0; step < SEARCH_STEPS; ++step) {
    const int64_t i = first + step * SEARCH_THREADS + threadIdx.x;
    const T x = i < n ? image[i] : T(0);
    if (!(x - x == 0) && (is_empty == nullptr || !is_empty[b * slots + i / width])) {
      found[l * gridDim.y + b] = true;
    }
  }
}

at::Tensor has_nonfinite(const at::Tensor& values_, const std::optional<at::Tensor>& is_empty_) {
  check_has_nonfinite(values_, is_empty_);
  const c10::cuda::CUDAGuard guard(values_.device());
  const int64_t layers = values_.size(0), batch = values_.size(1), slots = values_.size(2);
  const int64_t width = values_.size(3);
  const bool is_flat = values_.stride(3) == 1 && values_.stride(2) == width;
  const auto values = is_flat ? values_ : values_.contiguous();
  const at::Tensor is_empty = is_empty_ ? is_empty_->contiguous() : at::Tensor();
  auto found = at::zeros({layers, batch}, values.options().dtype(at::kBool));
  if (values.numel() == 0) {
    return found;
  }
  constexpr int64_t part = SEARCH_THREADS * SEARCH_STEPS;
  const dim3 grid(
      static_cast<unsigned>((slots * width + part - 1) / part), static_cast<unsigned>(batch),
      static_cast<unsigned>(layers));
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "has_nonfinite", [&] {
    search_kernel<scalar_t>
        <<<grid, SEARCH_THREADS, 0, c10::cuda::getCurrentCUDAStream()>>>(
            values.const_data_ptr<scalar_t>(), values.stride(0), values.stride(1), slots, width,
            is_empty.defined() ? is_empty.const_data_ptr<bool>() : nullptr,
            found.mutable_data_ptr<bool>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return found;
}

} // namespace

TORCH_LIBRARY_IMPL(dn_detr, CUDA, m) {
  m.impl("assign_objects", assign_objects);
  m.impl("has_nonfinite", has_nonfinite);
}

} // namespace dn_detr
