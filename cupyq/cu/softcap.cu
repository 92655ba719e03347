// softcap: y[i] = cap * tanh(x[i] / cap)
//
// Work split  `vector` values a thread, 256 threads a block.
// Numerics    fp32 (IEEE division; tanhf within 2 ulp, not the approximate instruction), one rounding at the store.
// Limits      n below 2^39; y may be x.
// Traffic     2 * n * sizeof(T) bytes
// Reference   cupyq/ops/activation.py: softcap_reference
#include "ptx.cuh"

template <typename T, int vector>
__global__ void __launch_bounds__(256) softcap(
    const T *x,  // [n]
    T *y,        // [n]
    int64 n, float cap) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int64 first = ((int64)blockIdx.x * 256 + threadIdx.x) * vector;
    if (first >= n) return;
    auto xs = *(const Vector<T, vector> *)(x + first);
    Vector<T, vector> ys;
    for (int i = 0; i < vector; i++) ys[i] = from_float<T>(cap * tanhf(to_float(xs[i]) / cap));
    *(Vector<T, vector> *)(y + first) = ys;
}
