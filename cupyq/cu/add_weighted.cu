// add_weighted: z[r, c] = x[r, c] + weights[r] * y[r, c]; where weights[r] is 0, z[r] = x[r] and y[r] is not read
//
// Work split  blocks (row, chunk of columns), 256 threads of `vector` values; more columns than 64 chunks are looped over.
// Numerics    one fp32 fused multiply-add, one rounding at the store.
// Limits      none on rows (grid x) or cols; z may be x, or y where the dtypes agree.
// Traffic     rows * cols * (2 * sizeof(X) + sizeof(Y)) bytes where the weight is not 0, none in place where it is
// Reference   cupyq/ops/elementwise.py: add_weighted_reference
#include "ptx.cuh"

template <typename X, typename Y, int vector>
__global__ void __launch_bounds__(256) add_weighted(
    const X *x,            // [rows, cols]
    const Y *y,            // [rows, cols]
    const float *weights,  // [rows]
    X *z,                  // [rows, cols]
    int cols) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    float weight = weights[blockIdx.x];
    if (weight == 0 && x == z) return;
    int64 row = (int64)blockIdx.x * cols;
    for (int c = (blockIdx.y * 256 + threadIdx.x) * vector; c < cols; c += gridDim.y * 256 * vector) {
        auto xs = *(const Vector<X, vector> *)(x + row + c);
        if (weight != 0) {
            auto ys = *(const Vector<Y, vector> *)(y + row + c);
            for (int i = 0; i < vector; i++) xs[i] = from_float<X>(fmaf(weight, to_float(ys[i]), to_float(xs[i])));
        }
        *(Vector<X, vector> *)(z + row + c) = xs;
    }
}
