// Argument checks; their messages name what was expected and what was passed.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <initializer_list>

namespace dn_detr {

// Checks that a product of sizes is below 2^bits without computing it, as it could overflow. Zeros
// count as one: products of some of the sizes are below 2^bits too.
inline void check_product(const char* name, at::IntArrayRef sizes, int bits) {
  int64_t rest = (int64_t{1} << bits) - 1;
  for (const int64_t size : sizes) {
    rest = size < 0 ? 0 : rest / std::max<int64_t>(size, 1);
  }
  TORCH_CHECK_VALUE(rest > 0, "expected ", name, " in [0, 2^", bits, "), got ", sizes);
}

// CUDA has a block of threads for each layer and image.
inline void check_images(int64_t layers, int64_t batch) {
  TORCH_CHECK_VALUE(
      layers >= 0 && layers <= 65535 && batch >= 0 && batch <= 65535,
      "expected at most 65535 layers and images, got ", layers, " and ", batch);
}

// legend: the sizes for the message, such as "[B, S, H, D]".
inline void check_ndim(const at::Tensor& x, const char* name, int64_t ndim, const char* legend) {
  TORCH_CHECK_VALUE(x.dim() == ndim, "expected ", name, " to be ", legend, ", got ", x.sizes());
}

inline void check_shape(const at::Tensor& x, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(x.sizes() == shape, "expected ", name, " to be ", shape, ", got ", x.sizes());
}

inline void check_dtype(
    const at::Tensor& x,
    const char* name,
    std::initializer_list<at::ScalarType> dtypes) {
  for (const auto dtype : dtypes) {
    if (x.scalar_type() == dtype) {
      return;
    }
  }
  TORCH_CHECK_VALUE(
      false, "expected ", name, " to be ", at::ArrayRef<at::ScalarType>(dtypes), ", got ",
      x.scalar_type());
}

inline void check_device(const at::Tensor& x, const char* name, const at::Tensor& other) {
  TORCH_CHECK_VALUE(
      x.device() == other.device(), "expected ", name, " on ", other.device(), ", got ",
      x.device());
}

} // namespace dn_detr
