// quantize_err: sums[i] = sum over r, c of |clamp(rint(x / s), lower, upper) * s - x|^err_norm at [r, c], s = scale[c] * p,
//               p = min_p + (max_p - min_p) * i / p_grid
//
// Work split  one block per value of p; its threads stride over all elements, 1024 at a time.
// Numerics    fp32, accurate powf; per-thread sums, then block_sum, in a fixed order. Where rint meets a tie, both
//             candidates err alike, so the sum is continuous in x and p.
// Limits      none on rows or cols.
// Traffic     rows * cols * 4 bytes from memory, (p_grid + 1) times that from L2: bound by arithmetic.
// Reference   cupyq/ops/quantizing.py: quantize_err_reference
#include "reduce.cuh"

__global__ void __launch_bounds__(1024) quantize_err(
    const float *x,      // [rows, cols]
    const float *scale,  // [cols]
    float *sums,         // [p_grid + 1]
    int64 count,         // rows * cols
    int cols, float lower, float upper, float err_norm, float min_p, float max_p, int p_grid) {
    __shared__ float partial[32];
    float fraction = (float)blockIdx.x / (float)p_grid;
    float p = min_p * (1.0f - fraction) + max_p * fraction;

    float sum = 0;
    uint32 c = threadIdx.x % cols, step = 1024 % cols;
    for (int64 i = threadIdx.x; i < count; i += 1024) {
        float s = scale[c] * p, value = x[i];
        float nearest = fmaxf(lower, fminf(upper, rintf(value / s)));  // NaN becomes upper, as in quantize
        sum += powf(fabsf(nearest * s - value), err_norm);
        c += step;
        if (c >= cols) c -= cols;
    }
    sum = block_sum<32>(sum, partial);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
