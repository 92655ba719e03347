// rms_norm: y[r, c] = x[r, c] * w[c] / sqrt(mean_c(x[r, c]^2) + eps) + residual[r, c]
//           is_ordered: y[r, j] = x[r, c] * w[c] / sqrt(mean_c(x[r, c]^2) + eps) with c = order[j]; 0 where order[j] is no column
//
// Work split  one block of 32 * warps threads per row; `vector` values per access (1 where a size or an address is odd).
// Numerics    fp32 sums in a fixed order, (x * w) * rsqrt + residual, one rounding at the store.
// Limits      none on rows (grid x), dim (with order: as shared memory holds) or count; residual may be null; y may be x or residual, but for is_ordered.
// Traffic     rows * dim * (sizeof(X) + sizeof(Y)) + dim * sizeof(W) bytes, and rows * dim * sizeof(Y) for the residual;
//             what a row has beyond 2 vectors a thread is read twice, from L1 or L2. With order, y has rows * count values and order 4 * count bytes.
// Reference   cupyq/ops/norm.py: rms_norm_reference
#include "norm.cuh"

template <typename X, typename W, typename Y, int vector, int warps, bool is_ordered>
__global__ void __launch_bounds__(32 * warps, 1) rms_norm(
    const X *x,         // [rows, dim]
    const W *w,         // [dim]
    const Y *residual,  // [rows, dim] or null
    const int *order,   // [count], null where not is_ordered
    Y *y,               // [rows, dim], or [rows, count] where is_ordered
    int dim, int count, float eps) {
    constexpr int step = 32 * warps * vector, held = 2;
    __shared__ float partial[warps];
    extern __shared__ uint4 row[];  // where is_ordered: dim values of Y
    int first = threadIdx.x * vector;
    prefetch_row<step>(w, first, dim);
    if (is_ordered) prefetch_row<step>(order, first, count);
    let_next_kernel_start();
    wait_for_previous_kernel();

    const X *x_row = x + (int64)blockIdx.x * dim;
    RowValues<X, vector, step, held> xs;
    RowValues<W, vector, step, held> ws;
    RowValues<Y, vector, step, held> residuals;
    RowValues<int, vector, step, held> columns;
    xs.load(x_row, first, dim);
    ws.load(w, first, dim);
    if constexpr (is_ordered) columns.load(order, first, count);
    if (!is_ordered && residual) residuals.load(residual + (int64)blockIdx.x * dim, first, dim);

    float sum = 0;
    each_column<step, held>(first, dim, [&](int c, int h) {
        auto values = xs.at(c, h);
        for (int i = 0; i < vector; i++) sum += to_float(values[i]) * to_float(values[i]);
    });
    float scale = 1.0f / sqrtf(block_sum<warps>(sum, partial) / dim + eps);

    if constexpr (is_ordered) {  // from the row in shared memory: gathering from L1 would take a cycle for each value
        each_column<step, held>(first, dim, [&](int c, int h) {
            auto x_here = xs.at(c, h);
            auto w_here = ws.at(c, h);
            Vector<Y, vector> ys;
            for (int i = 0; i < vector; i++) ys[i] = from_float<Y>(to_float(x_here[i]) * to_float(w_here[i]) * scale);
            *(Vector<Y, vector> *)((Y *)row + c) = ys;
        });
        __syncthreads();
        each_column<step, held>(first, count, [&](int j, int h) {
            auto from = columns.at(j, h);
            Vector<Y, vector> ys;
            for (int i = 0; i < vector; i++) {
                bool is_column = (uint32)from[i] < (uint32)dim;
                ys[i] = is_column ? ((const Y *)row)[from[i]] : from_float<Y>(0);
            }
            *(Vector<Y, vector> *)(y + (int64)blockIdx.x * count + j) = ys;
        });
    } else {
        each_column<step, held>(first, dim, [&](int c, int h) {
            auto x_here = xs.at(c, h);
            auto w_here = ws.at(c, h);
            Vector<Y, vector> residual_here, ys;
            if (residual) residual_here = residuals.at(c, h);
            for (int i = 0; i < vector; i++) {
                float value = to_float(x_here[i]) * to_float(w_here[i]) * scale;
                ys[i] = from_float<Y>(residual ? value + to_float(residual_here[i]) : value);
            }
            *(Vector<Y, vector> *)(y + (int64)blockIdx.x * dim + c) = ys;
        });
    }
}
