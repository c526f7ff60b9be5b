// Runs the kernels of an operator of deformable attention on all threads. No include guard:
// included once per operator, after instruction_sets.h.

// Contiguous, and float16, which few CPUs can convert, as float32.
inline at::Tensor without_half(const at::Tensor& x) {
  return (x.scalar_type() == at::kHalf ? x.to(at::kFloat) : x).contiguous();
}

// Calls f(T(), S(), O()): types of the computation, the value and `other`.
template <typename F>
void with_types(const at::Tensor& value, const at::Tensor& other, const F& f) {
  if (value.scalar_type() == at::kDouble) {
    f(double(), double(), double());
  } else if (value.scalar_type() == at::kFloat) {
    f(float(), float(), float());
  } else if (other.scalar_type() == at::kFloat) {
    f(float(), at::BFloat16(), float());
  } else {
    f(float(), at::BFloat16(), at::BFloat16());
  }
}

template <typename T, typename S, typename Z, typename In>
void run_forward(const Z& z, const In& in, const at::Tensor& value, const at::Tensor& output) {
  const auto kernel = KERNEL_FOR_THIS_CPU(forward<T, S, Z, In>);
  const S* from = value.const_data_ptr<S>();
  S* to = output.mutable_data_ptr<S>();
  for_rows(z, [&](int64_t begin, int64_t end) { kernel(z, in, from, to, begin, end); });
}

// is_summed: a gradient in `out` is a sum over heads.
template <typename T, typename S, typename Z, typename In, typename Out>
void run_backward(
    const Z& z,
    const In& in,
    const Out& out,
    const at::Tensor& value,
    const at::Tensor& grad_output,
    const at::Tensor& grad_value,
    bool is_summed) {
  const S* from = value.const_data_ptr<S>();
  const S* grad = grad_output.const_data_ptr<S>();
  S* to = grad_value.mutable_data_ptr<S>();
  const auto order = order_of_queries(z);
  if (has_heads_for_all_threads(z) && !is_summed) {
    const auto backward = KERNEL_FOR_THIS_CPU(backward<T, S, Z, In, Out>);
    for_heads(z, [&](int64_t begin, int64_t end) {
      backward(z, in, from, grad, to, out, order.data(), begin, end);
    });
    return;
  }
  const auto differentiate = KERNEL_FOR_THIS_CPU(differentiate<T, S, Z, In, Out>);
  const auto scatter = KERNEL_FOR_THIS_CPU(scatter<T, S, Z, In>);
  for_rows(z, [&](int64_t begin, int64_t end) {
    differentiate(z, in, from, grad, out, begin, end);
  });
  for_parts(z, [&](int64_t parts, int64_t begin, int64_t end) {
    scatter(z, in, grad, to, order.data(), parts, begin, end);
  });
}
