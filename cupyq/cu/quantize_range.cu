// quantize_range: for the rows c = first ... first + rows - 1 in this order, with U the upper Cholesky factor of H^-1:
//     quant[c] = quantize(weights[c]);  error[c] = (weights[c] - quant[c]) / U[c, c]
//     weights[r] -= U[c, r] * error[c]  for r = c ... first + rows - 1
//
// Work split  columns are independent: a block owns 32 of them, one per lane. Row r lives in a register of warp r % 8, so a
//             row's owner has all earlier updates, and only error[c] crosses warps: one barrier a row.
// Numerics    fp32 after the division of quantize.cuh; every weight takes its updates one by one in the order of c, by fused
//             multiply-adds, here and in propagate_error: the result does not depend on how the host cuts a long range.
// Limits      rows <= 64 (the host cuts longer ranges); any k and cols. U below its diagonal is not read.
// Traffic     rows * cols * (16 + 2 where codes are written) bytes.
// Reference   cupyq/ops/quantizing.py: quantize_range_reference
#include "quantize.cuh"

const int range_rows = 64, warps = 8, warp_rows = range_rows / warps;

__global__ void __launch_bounds__(32 * warps) quantize_range(
    float *weights,      // [k, cols]
    float *quant,        // [k, cols]
    float *error,        // [k, cols]
    short *codes,        // [k, cols] or null
    const float *scale,  // [cols]
    const float *u,      // [k, k]
    int k, int cols, int first, int rows, float qzero, float maxq) {
    __shared__ float u_of[range_rows][range_rows];  // U[first + c, first + r]
    __shared__ float error_of[range_rows][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int column = blockIdx.x * 32 + lane;
    bool is_inside = column < cols;

    for (int i = threadIdx.x; i < range_rows * range_rows; i += 32 * warps) {
        int c = i / range_rows, r = i % range_rows;
        if (c <= r && r < rows) u_of[c][r] = u[(int64)(first + c) * k + first + r];
    }
    float w[warp_rows];  // row warps * i + warp of the range
#pragma unroll
    for (int i = 0; i < warp_rows; i++) {
        int r = warps * i + warp;
        w[i] = is_inside && r < rows ? weights[(int64)(first + r) * cols + column] : 0.0f;
    }
    float s = is_inside ? scale[column] : 1.0f;
    __syncthreads();

    for (int c = 0; c < rows; c++) {
        if (warp == c % warps) {
            float weight = w[0];
#pragma unroll
            for (int i = 1; i < warp_rows; i++) weight = i == c / warps ? w[i] : weight;
            float code = quantize_code(weight, s, qzero, maxq);
            float value = dequantize_code(code, s, qzero);
            float off = (weight - value) / u_of[c][c];
            error_of[c][lane] = off;
            if (is_inside) {
                int64 at = (int64)(first + c) * cols + column;
                quant[at] = value;
                error[at] = off;
                if (codes) codes[at] = (short)code;
            }
        }
        __syncthreads();
        float off = error_of[c][lane];
#pragma unroll
        for (int i = 0; i < warp_rows; i++) {
            int r = warps * i + warp;
            if (r >= c && r < rows) w[i] = fmaf(-u_of[c][r], off, w[i]);
        }
    }

#pragma unroll
    for (int i = 0; i < warp_rows; i++) {
        int r = warps * i + warp;
        if (is_inside && r < rows) weights[(int64)(first + r) * cols + column] = w[i];
    }
}
