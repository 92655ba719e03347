// clamp: y[i] = min(max(x[i], -bound), bound)
//
// Work split  `vector` values a thread, 256 threads a block.
// Numerics    comparisons in fp32; only bound itself may be rounded, at the store. NaN stays NaN.
// Limits      n below 2^39; y may be x.
// Traffic     2 * n * sizeof(T) bytes
// Reference   cupyq/ops/activation.py: clamp_reference
#include "ptx.cuh"

template <typename T, int vector>
__global__ void __launch_bounds__(256) clamp(
    const T *x,  // [n]
    T *y,        // [n]
    int64 n, float bound) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int64 first = ((int64)blockIdx.x * 256 + threadIdx.x) * vector;
    if (first >= n) return;
    auto xs = *(const Vector<T, vector> *)(x + first);
    Vector<T, vector> ys;
    for (int i = 0; i < vector; i++) {
        float value = to_float(xs[i]);
        ys[i] = from_float<T>(value > bound ? bound : value < -bound ? -bound : value);
    }
    *(Vector<T, vector> *)(y + first) = ys;
}
