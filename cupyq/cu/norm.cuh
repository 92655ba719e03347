// What the norms share: a row's values in registers between its passes, and the sum of squares of a head.
#pragma once
#include "ptx.cuh"
#include "reduce.cuh"

// Calls body(c, h) for the columns c = first, first + step, ... below `end`; h counts them up to `held`, at compile time.
template <int step, int held, typename Body>
__device__ __forceinline__ void each_column(int first, int end, Body body) {
#pragma unroll
    for (int h = 0; h < held; h++)
        if (first + h * step < end) body(first + h * step, h);
#pragma unroll 2
    for (int c = first + held * step; c < end; c += step) body(c, held);
}

// A thread's vectors of a row, of which the first `held` are loaded at once and kept; the others are read when asked for.
template <typename T, int vector, int step, int held> struct RowValues {
    const T *row;
    Vector<T, vector> kept[held];

    __device__ __forceinline__ void load(const T *row_, int first, int end) {
        row = row_;
#pragma unroll
        for (int h = 0; h < held; h++)
            if (first + h * step < end) kept[h] = *(const Vector<T, vector> *)(row + first + h * step);
    }
    // Column c, the h-th of this thread.
    __device__ __forceinline__ Vector<T, vector> at(int c, int h) const {
        return h < held ? kept[h] : *(const Vector<T, vector> *)(row + c);
    }
};

// Brings parameters to the L2 cache. Nothing is read, so this may come before wait_for_previous_kernel().
template <int step, typename T> __device__ __forceinline__ void prefetch_row(const T *row, int first, int end) {
    for (int c = first; c < end; c += step)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(row + c)));
}

// The sum of (x - mean)^2 over a head, by one warp, and 1 / sqrt of its mean plus eps. A lane adds up `columns` neighbours at a
// time, whatever the width `vector` of its accesses: the sum does not depend on addresses.
template <int columns, int vector, typename T>
__device__ __forceinline__ float head_scale(const T *head, int head_dim, float mean, float eps) {
    float squares = 0;
    for (int first = threadIdx.x % 32 * columns; first < head_dim; first += 32 * columns)
#pragma unroll
        for (int c = 0; c < columns; c += vector) {
            auto xs = *(const Vector<T, vector> *)(head + first + c);
            for (int i = 0; i < vector; i++) {
                float deviation = to_float(xs[i]) - mean;
                squares = fmaf(deviation, deviation, squares);
            }
        }
    return 1.0f / sqrtf(warp_sum(squares) / head_dim + eps);
}
