// add: z[i] = x[i] + y[i], in x's dtype
//
// Work split  `vector` values a thread, 256 threads a block.
// Numerics    one fp32 addition, one rounding at the store.
// Limits      n below 2^39; z may be x, or y where the dtypes agree.
// Traffic     n * (2 * sizeof(X) + sizeof(Y)) bytes
// Reference   cupyq/ops/elementwise.py: add_reference
#include "ptx.cuh"

template <typename X, typename Y, int vector>
__global__ void __launch_bounds__(256)
    add(const X *x,  // [n]
        const Y *y,  // [n]
        X *z,        // [n]
        int64 n) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int64 first = ((int64)blockIdx.x * 256 + threadIdx.x) * vector;
    if (first >= n) return;
    auto xs = *(const Vector<X, vector> *)(x + first);
    auto ys = *(const Vector<Y, vector> *)(y + first);
    for (int i = 0; i < vector; i++) xs[i] = from_float<X>(to_float(xs[i]) + to_float(ys[i]));
    *(Vector<X, vector> *)(z + first) = xs;
}
