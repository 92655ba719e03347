// gelu_mul: y[i] = gelu(gate[i]) * up[i], with gelu's tanh or erf form
//
// Work split  `vector` values a thread, 256 threads a block.
// Numerics    fp32 (expf and erfcf as CUDA documents them, not the approximate instructions), one rounding at the store.
// Limits      n below 2^39; y may be gate or up.
// Traffic     3 * n * sizeof(T) bytes
// Reference   cupyq/ops/activation.py: gelu_mul_reference
#include "activation.cuh"

template <typename T, bool is_tanh, int vector>
__global__ void __launch_bounds__(256) gelu_mul(
    const T *gate,  // [n]
    const T *up,    // [n]
    T *y,           // [n]
    int64 n) {
    int64 first = ((int64)blockIdx.x * 256 + threadIdx.x) * vector;
    if (first >= n) return;
    auto gates = *(const Vector<T, vector> *)(gate + first);
    auto ups = *(const Vector<T, vector> *)(up + first);
    Vector<T, vector> ys;
    for (int i = 0; i < vector; i++) ys[i] = from_float<T>(gelu_float<is_tanh>(to_float(gates[i])) * to_float(ups[i]));
    *(Vector<T, vector> *)(y + first) = ys;
}
