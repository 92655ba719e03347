// propagate_error: weights[r, n] -= sum over c = first ... last - 1 of U[c, r] * error[c, n], for r = row ... row_end - 1
//
// Work split  tiles of 128 rows by 64 columns of weights, 8 x 4 values in the registers of each thread, 32 rows c at a time.
// Numerics    fp32; every weight takes its updates one by one in the order of c, by fused multiply-adds.
// Limits      any k and cols; rows up to 128 * 65535 (grid y).
// Traffic     (row_end - row) * cols * 8 bytes; U and error are read again by every tile, from L2.
// Reference   cupyq/ops/quantizing.py: quantize_range_reference
#include "types.cuh"

const int tile_rows = 128, tile_cols = 64, tile_depth = 32;

__global__ void __launch_bounds__(256) propagate_error(
    float *weights,      // [k, cols]
    const float *error,  // [k, cols]
    const float *u,      // [k, k]
    int k, int cols, int first, int last, int row, int row_end) {
    __shared__ __align__(16) float u_of[tile_depth][tile_rows];
    __shared__ float error_of[tile_depth][tile_cols];
    int row_0 = row + blockIdx.y * tile_rows, column_0 = blockIdx.x * tile_cols;
    int tile_row = threadIdx.x / 16 * 8, tile_column = threadIdx.x % 16;  // 8 rows; 4 columns 16 apart

    auto is_mine = [&](int i, int j) {
        return row_0 + tile_row + i < row_end && column_0 + tile_column + 16 * j < cols;
    };
    auto weight = [&](int i, int j) -> float & {
        return weights[(int64)(row_0 + tile_row + i) * cols + column_0 + tile_column + 16 * j];
    };
    float w[8][4];
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) w[i][j] = is_mine(i, j) ? weight(i, j) : 0.0f;

    for (int c_0 = first; c_0 < last; c_0 += tile_depth) {
        for (int i = threadIdx.x; i < tile_depth * tile_rows; i += 256) {
            int c = c_0 + i / tile_rows, r = row_0 + i % tile_rows;
            u_of[i / tile_rows][i % tile_rows] = c < last && r < row_end ? u[(int64)c * k + r] : 0.0f;
        }
        for (int i = threadIdx.x; i < tile_depth * tile_cols; i += 256) {
            int c = c_0 + i / tile_cols, column = column_0 + i % tile_cols;
            error_of[i / tile_cols][i % tile_cols] = c < last && column < cols ? error[(int64)c * cols + column] : 0.0f;
        }
        __syncthreads();
#pragma unroll 4
        for (int c = 0; c < tile_depth; c++) {
            auto low = *(const Vector<float, 4> *)&u_of[c][tile_row],
                 high = *(const Vector<float, 4> *)&u_of[c][tile_row + 4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float off = error_of[c][tile_column + 16 * j];
#pragma unroll
                for (int i = 0; i < 8; i++) w[i][j] = fmaf(-(i < 4 ? low[i % 4] : high[i % 4]), off, w[i][j]);
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (is_mine(i, j)) weight(i, j) = w[i][j];
}
