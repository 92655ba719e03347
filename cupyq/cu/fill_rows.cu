// fill_rows: y[r, first + c] = bias[c] + residual[r, first + c]: what a product with them is accumulated onto
//
// Work split  one thread per column and every gridDim.y-th row.
// Numerics    fp32, one rounding to Y. A bias or residual that is null counts as 0; residual may be y.
// Limits      rows * n beyond 2^31 is fine.
// Traffic     rows * columns * sizeof(Y) bytes, twice with a residual.
// Reference   cupyq/ops/matmul.py: matmul_reference
#include "types.cuh"

template <typename B, typename Y>
__global__ void __launch_bounds__(256) fill_rows(
    const B *bias,      // [columns] or null
    const Y *residual,  // [rows, n] or null
    Y *y,               // [rows, n]
    int rows, int n, int first, int columns) {
    int c = blockIdx.x * 256 + threadIdx.x;
    if (c >= columns) return;
    float of_column = bias ? to_float(bias[c]) : 0;
    for (int r = blockIdx.y; r < rows; r += gridDim.y) {
        int64 at = (int64)r * n + first + c;
        y[at] = from_float<Y>(residual ? of_column + to_float(residual[at]) : of_column);
    }
}
