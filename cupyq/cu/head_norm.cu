// head_norm: each head's row of head_dim values normalised like rms_norm or layer_norm, times w[h], plus b[h]
//
// Work split  one warp per (row, head), four warps a block; a lane takes `columns` neighbouring values at a time, in accesses
//             of `vector` (less than columns at odd addresses only). A head of 128 fp16 values is one access of half a warp:
//             the later passes read it from the L1.
// Numerics    fp32 sums in a fixed order; for layer_norm the variance comes from the deviations; one rounding at the store.
// Limits      none on rows (grid x, int64) or head_dim; y may be x; b may be null; w_rows is 1 (shared by all heads) or heads.
// Traffic     rows * head_dim * 2 * sizeof(X) + 2 * w_rows * head_dim * sizeof(W) bytes
// Reference   cupyq/ops/norm.py: head_norm_reference
#include "norm.cuh"

template <typename X, typename W, bool is_rms, int columns, int vector>
__global__ void __launch_bounds__(128) head_norm(
    const X *x,  // [rows, head_dim]; rows counts the heads of all tokens
    const W *w,  // [w_rows, head_dim]
    const W *b,  // [w_rows, head_dim] or null
    X *y,        // [rows, head_dim]
    int64 rows, int w_rows, int head_dim, float eps) {
    int64 row = (int64)blockIdx.x * 4 + threadIdx.x / 32;
    int64 w_row = row % w_rows * head_dim;
    int first = threadIdx.x % 32 * vector;
    if (row < rows) prefetch_row<32 * vector>(w + w_row, first, head_dim);
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (row >= rows) return;  // whole warps leave: the shuffles below stay complete
    const X *x_row = x + row * head_dim;
    X *y_row = y + row * head_dim;

    float mean = 0;
    if constexpr (!is_rms) {
        for (int start = threadIdx.x % 32 * columns; start < head_dim; start += 32 * columns)
#pragma unroll
            for (int c = 0; c < columns; c += vector) {
                auto xs = *(const Vector<X, vector> *)(x_row + start + c);
                for (int i = 0; i < vector; i++) mean += to_float(xs[i]);
            }
        mean = warp_sum(mean) / head_dim;
    }
    float scale = head_scale<columns, vector>(x_row, head_dim, mean, eps);

    for (int c = first; c < head_dim; c += 32 * vector) {
        auto xs = *(const Vector<X, vector> *)(x_row + c);
        auto ws = *(const Vector<W, vector> *)(w + w_row + c);
        Vector<W, vector> bs;
        if (b) bs = *(const Vector<W, vector> *)(b + w_row + c);
        Vector<X, vector> ys;
        for (int i = 0; i < vector; i++) {
            float value = (to_float(xs[i]) - mean) * to_float(ws[i]) * scale;
            ys[i] = from_float<X>(b ? value + to_float(bs[i]) : value);
        }
        *(Vector<X, vector> *)(y_row + c) = ys;
    }
}
