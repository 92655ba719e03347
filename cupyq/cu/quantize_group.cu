// quantize_group: for the rows r of a group in order, in every column:
//     t = target[r] + sum over j < r of factor[j, r] * error[j]
//     code = clamp(rint(t / scale) + zero, 0, maxq);  q = RN16((code - zero) * scale)
//     error[r] = original[r] - q;  loss += weights[r] * (t - q)^2
//
// Work split  a block owns 32 columns, one per lane. Row r lives in a register of warp r % 8, so a row's owner has all earlier
//             updates, and only error[r] crosses warps: one barrier a row.
// Numerics    fp32 with every step rounded: a row takes its updates one by one in the order of j; t / scale is t times the
//             rounded 1 / scale; a warp adds up the losses of its rows in order, then the 8 warps are summed in order.
// Limits      rows <= max_rows (32, 64 or 128); any n. The factor is read above its diagonal only.
// Traffic     rows * n * 13 + n * 8 bytes, and rows^2 * 2 bytes of the factor in each block, from L2.
// Reference   cupyq/ops/quantize_group.py: quantize_group_reference
#include "scale_search.cuh"

template <int max_rows>
__global__ void __launch_bounds__(32 * slice_warps) quantize_group(
    const float *target,        // [rows, n]
    const float *original,      // [rows, n]
    const float *factor,        // [rows, rows]
    const float *loss_weights,  // [rows]
    const half *scales,         // [n]
    const uint8 *zeros,         // [n] or null: `middle`
    uint8 *codes,               // [rows, n]
    float *error,               // [rows, n]
    float *loss,                // [n]
    int rows, int n, float middle, float maxq) {
    constexpr int warps = slice_warps, warp_rows = max_rows / warps;
    __shared__ float factor_of[max_rows * (max_rows - 1) / 2];  // row by row, what lies above the diagonal
    __shared__ float weights[max_rows];
    __shared__ float errors[2][32];  // of this row, while slow warps still read those of the last
    __shared__ float losses[warps][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * slice_cols + lane;
    bool is_inside = column < n;
    auto start_of = [](int j) { return j * (2 * max_rows - 1 - j) / 2 - j - 1; };  // plus r: the place of factor[j, r]

    for (int j = warp; j < rows; j += warps) {
        for (int r = j + 1 + lane; r < max_rows; r += 32)
            factor_of[start_of(j) + r] = r < rows ? factor[j * rows + r] : 0.0f;
    }
    for (int r = threadIdx.x; r < rows; r += 32 * warps) weights[r] = loss_weights[r];
    float t[warp_rows], w[warp_rows];  // row warps * i + warp of the group
#pragma unroll
    for (int i = 0; i < warp_rows; i++) {
        int r = warps * i + warp;
        bool is_there = is_inside && r < rows;
        t[i] = is_there ? target[(int64)r * n + column] : 0.0f;
        w[i] = is_there ? original[(int64)r * n + column] : 0.0f;
    }
    float scale = is_inside ? to_float(scales[column]) : 0.0f;
    float zero = is_inside && zeros ? (float)zeros[column] : middle;
    float inverse = inverse_of(scale), lost = 0;
    __syncthreads();

#pragma unroll
    for (int i = 0; i < warp_rows; i++) {
#pragma unroll 1  // unrolled, the code would outgrow the instruction cache
        for (int k = 0; k < warps; k++) {
            int row = warps * i + k;
            if (row >= rows) break;
            if (warp == k) {
                float code = nearest_level(t[i], inverse, -zero, maxq - zero) + zero;
                float value = to_float(from_float<half>((code - zero) * scale));  // never -0, as when decoded
                float off = __fsub_rn(t[i], value), left = __fsub_rn(w[i], value);
                errors[k % 2][lane] = left;
                lost = __fadd_rn(lost, __fmul_rn(__fmul_rn(off, off), weights[row]));
                if (is_inside) {
                    codes[(int64)row * n + column] = (uint8)code;
                    error[(int64)row * n + column] = left;
                }
            }
            __syncthreads();
            float left = errors[k % 2][lane];
            const float *factors = factor_of + start_of(row) + warp;
            if (warp > k) t[i] = __fadd_rn(t[i], __fmul_rn(factors[warps * i], left));
#pragma unroll
            for (int later = i + 1; later < warp_rows; later++) {
                t[later] = __fadd_rn(t[later], __fmul_rn(factors[warps * later], left));
            }
        }
    }

    losses[warp][lane] = lost;
    __syncthreads();
    if (warp > 0 || !is_inside) return;
    for (int k = 1; k < warps; k++) lost = __fadd_rn(lost, losses[k][lane]);
    loss[column] = lost;
}
