// What the searches for scales and quantize_group share: a slice of a group in shared memory, and a weight's nearest level.
//
// NumPy follows these kernels bit for bit and has no fused multiply-add: products and sums that are not exact are rounded one
// by one, by intrinsics that the compiler does not fuse.
#pragma once
#include "reduce.cuh"

const int slice_cols = 32;   // the columns of a block, one per lane
const int slice_warps = 8;   // which share the work on a slice
const int slice_rows = 128;  // the most rows a slice holds

struct Slice {
    float weights[slice_rows];
    float target[slice_rows][slice_cols];
};

// Rows first ... first + rows - 1 of the block's columns; zeros beyond n. All threads of the block take part.
__device__ __forceinline__ void load_slice(
    Slice &slice,
    const float *target,   // [.., n]
    const float *weights,  // [..]
    int64 first, int rows, int n) {
    int lane = threadIdx.x % 32, column = blockIdx.x * slice_cols + lane;
    for (int r = threadIdx.x / 32; r < rows; r += slice_warps) {
        slice.target[r][lane] = column < n ? target[(first + r) * n + column] : 0.0f;
    }
    for (int r = threadIdx.x; r < rows; r += 32 * slice_warps) slice.weights[r] = weights[first + r];
}

// 1 / scale, or 0 where the scale is 0: then every level is 0.
__device__ __forceinline__ float inverse_of(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

// The whole number from lowest to highest that is nearest to x / scale, but for the two roundings of x * inverse.
__device__ __forceinline__ float nearest_level(float x, float inverse, float lowest, float highest) {
    return fmaxf(lowest, fminf(highest, rintf(__fmul_rn(x, inverse))));
}

// sum + weight * (x - level * scale)^2. The inner product is exact: 8 bits times 11.
__device__ __forceinline__ float add_error(float sum, float weight, float x, float level, float scale) {
    float off = fmaf(-level, scale, x);
    return __fadd_rn(sum, __fmul_rn(__fmul_rn(off, off), weight));
}

// A candidate of a search: share i of the plain value, as float16 in float32.
__device__ __forceinline__ float candidate(float plain, float first_share, float share_step, int i) {
    float share = __fsub_rn(first_share, __fmul_rn(share_step, (float)i));
    return to_float(from_float<half>(fminf(65504.0f, __fmul_rn(plain, share))));
}
