// Helpers of both matching operators on the CPU.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace dn_detr {

// Calls work(i) for every i in [0, n), dynamically scheduled over threads.
template <typename Work>
void parallel_for_dynamic(int64_t n, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(n, at::get_num_threads());
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < n; i = next++) {
      work(i);
    }
  });
}

// Index of the first object of each image, and the number of objects: batch + 1 values.
inline std::vector<int64_t> first_of_each_image(const at::Tensor& image_of_, int64_t batch) {
  const auto image_of = image_of_.contiguous();
  const int64_t* image = image_of.const_data_ptr<int64_t>();
  std::vector<int64_t> first;
  for (int64_t t = 0; t < image_of.numel(); ++t) {
    TORCH_CHECK_VALUE(
        image[t] >= 0 && image[t] < batch && (t == 0 || image[t - 1] <= image[t]),
        "expected image_of to ascend within [0, ", batch, "), got ", image[t], " at ", t);
    first.resize(std::max<int64_t>(image[t] + 1, first.size()), t);
  }
  first.resize(batch + 1, image_of.numel());
  return first;
}

} // namespace dn_detr
