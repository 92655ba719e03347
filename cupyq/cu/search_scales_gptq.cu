// search_scales_gptq: scale[c] (float16) and zero[c] such that sum over r of weights[r] * (target[r, c] - level * scale[c])^2 is
//                     small, level the nearest whole number from -zero[c] to maxq - zero[c]
//
// Work split  32 columns per block, one per lane; rows go through shared memory 128 at a time; each of the 8 warps tries 4
//             shares of the plain scale, each with `zeros_tried` zero points.
// Numerics    fp32 with every step rounded, a column's rows in order. NumPy repeats them. Ties go to the first candidate.
// Limits      none on rows or n. Finite values.
// Traffic     rows * n * 8 bytes: bound by arithmetic, 32 * zeros_tried * 8 instructions per weight.
// Reference   cupyq/ops/quantize_group.py: search_scales_gptq_reference
#include "scale_search.cuh"

const int warp_shares = 4;

template <int zeros_tried>  // 1: the zero point is `middle`; 3: what the extremes ask for, and its neighbours
__global__ void __launch_bounds__(32 * slice_warps) search_scales_gptq(
    const float *target,   // [rows, n]
    const float *weights,  // [rows]
    half *scales,          // [n]
    uint8 *zeros,          // [n]
    int rows, int n, float middle, float maxq, float to_scale, float first_share, float share_step) {
    __shared__ Slice slice;
    __shared__ float lows[slice_warps][slice_cols], highs[slice_warps][slice_cols],
        found_zeros[slice_warps][slice_cols];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * slice_cols + lane;

    float low = 0, high = 0;
    if (column < n) {
#pragma unroll 4
        for (int r = warp; r < rows; r += slice_warps) {
            float x = target[(int64)r * n + column];
            low = fminf(low, x);
            high = fmaxf(high, x);
        }
    }
    lows[warp][lane] = low;
    highs[warp][lane] = high;
    __syncthreads();
    for (int w = 0; w < slice_warps; w++) {
        low = fminf(low, lows[w][lane]);
        high = fmaxf(high, highs[w][lane]);
    }

    float plain, zero[zeros_tried];
    if constexpr (zeros_tried == 1) {
        plain = __fmul_rn(fmaxf(high, fabsf(low)), to_scale);
        zero[0] = middle;
    } else {
        plain = __fmul_rn(__fsub_rn(high, low), to_scale);
        float nearest = fmaxf(1.0f, fminf(maxq, rintf(__fmul_rn(-low, inverse_of(plain)))));
        for (int z = 0; z < zeros_tried; z++)
            zero[z] = fmaxf(1.0f, fminf(maxq, nearest + (z == 1 ? -1.0f : z == 2 ? 1.0f : 0.0f)));
    }
    float scale[warp_shares], inverse[warp_shares], error[warp_shares][zeros_tried];
#pragma unroll
    for (int i = 0; i < warp_shares; i++) {
        scale[i] = candidate(plain, first_share, share_step, warp * warp_shares + i);
        inverse[i] = inverse_of(scale[i]);
#pragma unroll
        for (int z = 0; z < zeros_tried; z++) error[i][z] = 0;
    }

    for (int first = 0; first < rows; first += slice_rows) {
        int count = rows - first < slice_rows ? rows - first : slice_rows;
        __syncthreads();  // the previous rows are done with, and so are `lows` and `highs`
        load_slice(slice, target, weights, first, count, n);
        __syncthreads();
        for (int r = 0; r < count; r++) {
            float x = slice.target[r][lane], weight = slice.weights[r];
#pragma unroll
            for (int i = 0; i < warp_shares; i++) {
#pragma unroll
                for (int z = 0; z < zeros_tried; z++) {
                    float level = nearest_level(x, inverse[i], -zero[z], maxq - zero[z]);
                    error[i][z] = add_error(error[i][z], weight, x, level, scale[i]);
                }
            }
        }
    }

    float least = error[0][0], best = scale[0], best_zero = zero[0];
#pragma unroll
    for (int i = 0; i < warp_shares; i++) {
#pragma unroll
        for (int z = 0; z < zeros_tried; z++) {
            if (error[i][z] < least) least = error[i][z], best = scale[i], best_zero = zero[z];
        }
    }
    lows[warp][lane] = least;
    highs[warp][lane] = best;
    found_zeros[warp][lane] = best_zero;
    __syncthreads();
    if (warp > 0 || column >= n) return;
    for (int w = 1; w < slice_warps; w++) {
        if (lows[w][lane] < least) least = lows[w][lane], best = highs[w][lane], best_zero = found_zeros[w][lane];
    }
    scales[column] = from_float<half>(best);
    zeros[column] = (uint8)best_zero;
}
