// search_scales: scale[c] = RN16(s[c]^2 * RN16(scale_max / 256)), s = 1 ... 16, with scale_max and s such that
//                sum over r, c of weights[r] * (target[r, c] - level * scale[c])^2 is small, level the nearest whole number
//
// Work split  scale_maxima: one thread per column. search_scales: 32 columns per block, one per lane, in shared memory; each of
//             the 8 warps takes every 8th candidate of scale_max and tries `window` values of s in a column at once.
//             choose_scales: 8192 columns per block; one warp per candidate sums the totals of all slices.
// Numerics    fp32 with every step rounded, a column's rows in order; totals in fp64: a tree over the 32 columns of a slice,
//             slices by lanes in order, a tree over the lanes. NumPy repeats these orders. Ties go to the first candidate.
// Limits      1 <= rows <= 128; any n. Finite values.
// Traffic     rows * n * 8 + n * 40 bytes: bound by arithmetic, 24 * window * 8 instructions per weight.
// Reference   cupyq/ops/quantize_group.py: search_scales_reference
#include "scale_search.cuh"

const int shares = 24;         // candidates of scale_max
const int maxima_cols = 256;   // columns of a block of scale_maxima
const int chosen_cols = 8192;  // columns of a block of choose_scales

__global__ void __launch_bounds__(maxima_cols) scale_maxima(
    const float *target,  // [rows, n]
    float *maxima,        // [ceil(n / 256)]: the largest |target| of so many columns
    int rows, int n) {
    __shared__ float partial[maxima_cols / 32];
    int column = blockIdx.x * maxima_cols + threadIdx.x;
    float largest = 0;
    if (column < n) {
#pragma unroll 8
        for (int r = 0; r < rows; r++) largest = fmaxf(largest, fabsf(target[(int64)r * n + column]));
    }
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = largest;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < maxima_cols / 32; w++) largest = fmaxf(largest, partial[w]);
        maxima[blockIdx.x] = largest;
    }
}

__device__ __forceinline__ double warp_sum(double x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

template <int window>
__global__ void __launch_bounds__(32 * slice_warps) search_scales(
    const float *target,   // [rows, n]
    const float *weights,  // [rows]
    const float *maxima,   // [ceil(n / 256)]
    double *totals,        // [ceil(n / 32), shares]: the least errors of a slice
    half *candidates,      // [shares]: scale_max
    uint8 *chosen,         // [shares, n]: s - 1 of the least error
    int rows, int n, float lowest, float highest, float to_base, float first_share, float share_step, float reach) {
    __shared__ Slice slice;
    __shared__ float partial[slice_warps][slice_cols];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * slice_cols + lane;

    load_slice(slice, target, weights, 0, rows, n);
    float largest = 0;
    for (int i = threadIdx.x; i * maxima_cols < n; i += 32 * slice_warps) largest = fmaxf(largest, maxima[i]);
    partial[warp][lane] = warp_max(largest);
    __syncthreads();
    for (int w = 0; w < slice_warps; w++) largest = fmaxf(largest, partial[w][lane]);
    float plain = __fmul_rn(largest, to_base);  // the scale that the column with the largest weight needs

    float base = 0;
    for (int r = 0; r < rows; r++) base = fmaxf(base, fabsf(slice.target[r][lane]));
    base = __fmul_rn(__fmul_rn(base, to_base), reach);

    for (int i = warp; i < shares; i += slice_warps) {
        float scale_max = candidate(plain, first_share, share_step, i);
        if (blockIdx.x == 0 && lane == 0) candidates[i] = from_float<half>(scale_max);
        float unit = to_float(from_float<half>(scale_max / 256.0f));
        float top = fmaxf(1.0f, fminf(16.0f, ceilf(sqrtf(base / unit))));
        float scale[window], inverse[window], error[window];
#pragma unroll
        for (int w = 0; w < window; w++) {
            float s = fmaxf(1.0f, top - (float)w);
            scale[w] = to_float(from_float<half>(s * s * unit));
            inverse[w] = inverse_of(scale[w]);
            error[w] = 0;
        }
        for (int r = 0; r < rows; r++) {
            float x = slice.target[r][lane], weight = slice.weights[r];
#pragma unroll
            for (int w = 0; w < window; w++) {
                error[w] = add_error(error[w], weight, x, nearest_level(x, inverse[w], lowest, highest), scale[w]);
            }
        }
        float least = error[0], best = top;
#pragma unroll
        for (int w = 1; w < window; w++) {
            if (error[w] < least) least = error[w], best = fmaxf(1.0f, top - (float)w);
        }
        if (column < n) chosen[(int64)i * n + column] = (uint8)(best - 1.0f);
        double total = warp_sum((double)least);
        if (lane == 0) totals[(int64)blockIdx.x * shares + i] = total;
    }
}

__global__ void __launch_bounds__(32 * shares) choose_scales(
    const double *totals,    // [ceil(n / 32), shares]
    const half *candidates,  // [shares]
    const uint8 *chosen,     // [shares, n]
    uint8 *codes,            // [n]: s - 1
    half *scale_max,         // [1]
    half *scales,            // [n] or null
    int n) {
    __shared__ double sums[shares];
    int lane = threadIdx.x % 32, share = threadIdx.x / 32;
    double sum = 0;
    for (int64 i = lane; i * slice_cols < n; i += 32) sum += totals[i * shares + share];
    sum = warp_sum(sum);
    if (lane == 0) sums[share] = sum;
    __syncthreads();

    int best = 0;
    double least = infinity_float();
    for (int i = 0; i < shares; i++) {
        if (sums[i] < least) least = sums[i], best = i;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *scale_max = candidates[best];
    float unit = to_float(from_float<half>(to_float(candidates[best]) / 256.0f));
    int64 first = (int64)blockIdx.x * chosen_cols, end = first + chosen_cols < n ? first + chosen_cols : n;
    for (int64 c = first + threadIdx.x; c < end; c += 32 * shares) {
        uint8 code = chosen[(int64)best * n + c];
        codes[c] = code;
        float s = (float)code + 1.0f;
        if (scales) scales[c] = from_float<half>(s * s * unit);
    }
}
