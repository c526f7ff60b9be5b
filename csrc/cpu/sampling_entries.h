// Entry points of the kernels of an operator of deformable attention. No include guard: compiled
// once per instruction set, after the operator's source_of(sizes, inputs[, gradients]).

template <typename T, typename S, typename Z, typename In>
void forward(const Z& z, const In& in, const S* value, S* output, int64_t begin, int64_t end) {
  sample_rows<T>(z, source_of(z, in), value, output, begin, end);
}

template <typename T, typename S, typename Z, typename In, typename Out>
void differentiate(
    const Z& z,
    const In& in,
    const S* value,
    const S* grad_output,
    const Out& out,
    int64_t begin,
    int64_t end) {
  differentiate_rows<T>(z, source_of(z, in, out), value, grad_output, begin, end);
}

template <typename T, typename S, typename Z, typename In>
void scatter(
    const Z& z,
    const In& in,
    const S* grad_output,
    S* grad_value,
    const int32_t* order,
    int64_t parts,
    int64_t begin,
    int64_t end) {
  scatter_parts<T>(z, source_of(z, in), grad_output, grad_value, order, parts, begin, end);
}

template <typename T, typename S, typename Z, typename In, typename Out>
void backward(
    const Z& z,
    const In& in,
    const S* value,
    const S* grad_output,
    S* grad_value,
    const Out& out,
    const int32_t* order,
    int64_t begin,
    int64_t end) {
  differentiate_heads<T>(
      z, source_of(z, in, out), value, grad_output, grad_value, order, begin, end);
}
