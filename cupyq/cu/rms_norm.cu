// rms_norm: y[r, c] = x[r, c] * w[c] / sqrt(mean_c(x[r, c]^2) + eps) + residual[r, c]
//
// Work split  one block of 32 * warps threads per row; `vector` values per access (1 where dim or an address is odd).
// Numerics    fp32 sums in a fixed order, (x * w) * rsqrt + residual, one rounding at the store.
// Limits      none on rows (grid x) or dim; y may be x or residual; residual may be null.
// Traffic     rows * dim * (sizeof(X) + sizeof(Y)) + dim * sizeof(W) bytes, and rows * dim * sizeof(Y) for the residual;
//             rows wider than the L1 are read twice from L2.
// Reference   cupyq/ops/norm.py: rms_norm_reference
#include "reduce.cuh"

template <typename X, typename W, typename Y, int vector, int warps>
__global__ void __launch_bounds__(32 * warps) rms_norm(
    const X *x,         // [rows, dim]
    const W *w,         // [dim]
    const Y *residual,  // [rows, dim] or null
    Y *y,               // [rows, dim]
    int dim, float eps) {
    __shared__ float partial[warps];
    int64 start = (int64)blockIdx.x * dim;
    const X *x_row = x + start;
    Y *y_row = y + start;

    float sum = 0;
    for (int c = threadIdx.x * vector; c < dim; c += 32 * warps * vector) {
        auto xs = *(const Vector<X, vector> *)(x_row + c);
        for (int i = 0; i < vector; i++) sum += to_float(xs[i]) * to_float(xs[i]);
    }
    float scale = 1.0f / sqrtf(block_sum<warps>(sum, partial) / dim + eps);

    for (int c = threadIdx.x * vector; c < dim; c += 32 * warps * vector) {
        auto xs = *(const Vector<X, vector> *)(x_row + c);
        auto ws = *(const Vector<W, vector> *)(w + c);
        Vector<Y, vector> residuals, ys;
        if (residual) residuals = *(const Vector<Y, vector> *)(residual + start + c);
        for (int i = 0; i < vector; i++) {
            float value = to_float(xs[i]) * to_float(ws[i]) * scale;
            ys[i] = from_float<Y>(residual ? value + to_float(residuals[i]) : value);
        }
        *(Vector<Y, vector> *)(y_row + c) = ys;
    }
}
