// fill_rows: y[r, first + c] = bias[first + c] for every row: what a product with bias is accumulated onto
//
// Work split  one thread per column and every gridDim.y-th row.
// Numerics    one rounding from B to Y.
// Limits      rows * n beyond 2^31 is fine.
// Traffic     rows * columns * sizeof(Y) bytes.
// Reference   cupyq/ops/matmul.py: matmul_reference
#include "types.cuh"

template <typename B, typename Y>
__global__ void __launch_bounds__(256) fill_rows(
    const B *bias,  // [n]
    Y *y,           // [rows, n]
    int rows, int n, int first, int columns) {
    int c = blockIdx.x * 256 + threadIdx.x;
    if (c >= columns) return;
    Y value = from_float<Y>(to_float(bias[first + c]));
    for (int r = blockIdx.y; r < rows; r += gridDim.y) y[(int64)r * n + first + c] = value;
}
