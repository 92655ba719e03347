// Sums and maxima over a warp and over a block, always in the same order: the same bits on every run.
#pragma once
#include "types.cuh"

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int step = 16; step > 0; step /= 2) {
        float y = __shfl_xor_sync(0xffffffffu, x, step);
        x = y > x || y != y ? y : x;  // keeps NaN, unlike fmaxf
    }
    return x;
}

// Sum over all threads of a block of `warps` full warps; every thread gets it. `partial`: `warps` floats of shared memory.
// The two barriers allow a second call with the same `partial`.
template <int warps> __device__ __forceinline__ float block_sum(float x, float *partial) {
    x = warp_sum(x);
    if constexpr (warps == 1) return x;
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
    for (int w = 0; w < warps; w++) total += partial[w];
    __syncthreads();
    return total;
}
