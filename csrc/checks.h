// Argument checks; their messages name what was expected and what was passed.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>

namespace dn_detr {

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
