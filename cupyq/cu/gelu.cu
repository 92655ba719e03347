// gelu: y[i] = gelu(x[i]), in the tanh or erf form
//
// Work split  `vector` values a thread, 256 threads a block.
// Numerics    fp32 (expf and erfcf as CUDA documents them, not the approximate instructions), one rounding at the store.
// Limits      n below 2^39; y may be x.
// Traffic     2 * n * sizeof(T) bytes
// Reference   cupyq/ops/activation.py: gelu_reference
#include "activation.cuh"

template <typename T, bool is_tanh, int vector>
__global__ void __launch_bounds__(256) gelu(
    const T *x,  // [n]
    T *y,        // [n]
    int64 n) {
    int64 first = ((int64)blockIdx.x * 256 + threadIdx.x) * vector;
    if (first >= n) return;
    auto xs = *(const Vector<T, vector> *)(x + first);
    Vector<T, vector> ys;
    for (int i = 0; i < vector; i++) ys[i] = from_float<T>(gelu_float<is_tanh>(to_float(xs[i])));
    *(Vector<T, vector> *)(y + first) = ys;
}
