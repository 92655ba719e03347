// hadamard: y[b, i] = scale * sum over j of (-1)^popcount(i & j) * x[b, j], for blocks b of `size` values
//
// Work split  size / values threads per block of values (a transform), each with `values` of them in registers, in runs of
//             up to 8 neighbours; 256 threads or more per CUDA block. One butterfly stage per bit of the index: bits of the
//             register by registers, bits of the lane by shuffles, bits of the warp through shared memory.
// Numerics    fp32 additions in a fixed order, one product with scale, one rounding at the store.
// Limits      size a power of two up to 32768; none on the number of transforms (grid x); y may be x.
// Traffic     2 * sizeof(X) bytes per value.
// Reference   cupyq/ops/hadamard.py: hadamard_reference
#include "types.cuh"

template <typename X, int size, int values, int vector>
__global__ void __launch_bounds__(size / values > 256 ? size / values : 256) hadamard(
    const X *x,   // [transforms, size]
    X *y,         // [transforms, size]
    int64 count,  // transforms
    float scale) {
    constexpr int team = size / values, threads = team > 256 ? team : 256;
    constexpr int run = values < 8 ? values : 8, runs = values / run;
    static_assert(team * values == size && run * runs == values && run % vector == 0 && team <= 1024, "whole runs");
    int64 transform = (int64)blockIdx.x * (threads / team) + threadIdx.x / team;
    int member = threadIdx.x % team;
    int64 first = transform * size + member * run;  // of run j: first + j * team * run
    bool is_inside = transform < count;             // threads without work stay for shuffles and barriers

    float v[values];
#pragma unroll
    for (int i = 0; i < values; i += vector) {
        Vector<X, vector> loaded = {};
        if (is_inside) loaded = *(const Vector<X, vector> *)(x + first + i / run * (team * run) + i % run);
#pragma unroll
        for (int e = 0; e < vector; e++) v[i + e] = to_float(loaded[e]);
    }

#pragma unroll
    for (int bit = 1; bit < values; bit *= 2)
#pragma unroll
        for (int i = 0; i < values; i++)
            if (!(i & bit)) {
                float low = v[i], high = v[i | bit];
                v[i] = low + high;
                v[i | bit] = low - high;
            }

#pragma unroll
    for (int bit = 1; bit < (team < 32 ? team : 32); bit *= 2)
#pragma unroll
        for (int i = 0; i < values; i++) {
            float other = __shfl_xor_sync(0xffffffffu, v[i], bit);
            v[i] = member & bit ? other - v[i] : v[i] + other;
        }

    if constexpr (team > 32) {
        __shared__ float exchanged[run][threads];
        for (int bit = 32; bit < team; bit *= 2)
#pragma unroll
            for (int j = 0; j < values; j += run) {
#pragma unroll
                for (int i = 0; i < run; i++) exchanged[i][threadIdx.x] = v[j + i];
                __syncthreads();
#pragma unroll
                for (int i = 0; i < run; i++) {
                    float other = exchanged[i][threadIdx.x ^ bit];
                    v[j + i] = member & bit ? other - v[j + i] : v[j + i] + other;
                }
                __syncthreads();
            }
    }

    if (!is_inside) return;
#pragma unroll
    for (int i = 0; i < values; i += vector) {
        Vector<X, vector> stored;
#pragma unroll
        for (int e = 0; e < vector; e++) stored[e] = from_float<X>(v[i + e] * scale);
        *(Vector<X, vector> *)(y + first + i / run * (team * run) + i % run) = stored;
    }
}
