// route: weights[e, r] = exp(logits[r, e]) / sum over the kept experts of exp(logits[r, .]) for the top_k experts e of row
// r, 0 for the others: the softmax over all experts, cut to the top_k and renormalised (the full sum cancels)
//
// Work split  one warp per row, eight rows a block; expert e lives in lane e % 32, slot e / 32. top_k rounds of a warp-wide
//             maximum; equal logits go to the lowest expert.
// Numerics    fp32, exponentials relative to the row's maximum, sum in a fixed order. A row whose maximum is not finite
//             (NaN, +Inf, or nothing but -Inf) becomes NaN in all experts.
// Limits      experts <= 32 * slots, slots <= 32 (one bit each); none on rows (grid x).
// Traffic     rows * experts * (sizeof(X) + 4) bytes; the transposed store of eight rows fills 32-byte sectors.
// Reference   cupyq/ops/routing.py: route_reference
#include "reduce.cuh"

template <typename X, int slots>
__global__ void __launch_bounds__(256) route(
    const X *logits,  // [rows, experts]
    float *weights,   // [experts, rows]
    int rows, int experts, int top_k) {
    int64 row = (int64)blockIdx.x * 8 + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (row >= rows) return;  // whole warps leave: the shuffles below stay complete

    float value[slots];
    float largest = -infinity_float();
    for (int s = 0; s < slots; s++) {
        int expert = 32 * s + lane;
        value[s] = expert < experts ? to_float(logits[row * experts + expert]) : -infinity_float();
        largest = value[s] > largest || value[s] != value[s] ? value[s] : largest;
    }
    largest = warp_max(largest);
    bool is_finite = largest - largest == 0;

    const int none = 32 * slots;
    uint32 kept = 0;  // bit s: expert 32 * s + lane
    for (int round = 0; round < top_k; round++) {
        int best = none;
        float best_value = 0;
        for (int s = 0; s < slots; s++) {
            int expert = 32 * s + lane;
            bool is_free = expert < experts && !(kept >> s & 1);
            if (is_free && (best == none || value[s] > best_value)) best = expert, best_value = value[s];
        }
        for (int step = 16; step > 0; step /= 2) {
            int other = __shfl_xor_sync(0xffffffffu, best, step);
            float other_value = __shfl_xor_sync(0xffffffffu, best_value, step);
            bool is_better = best == none || other_value > best_value || (other_value == best_value && other < best);
            if (other != none && is_better) best = other, best_value = other_value;
        }
        if (best % 32 == lane) kept |= 1u << best / 32 % 32;
    }

    float sum = 0;
    for (int s = 0; s < slots; s++) {
        value[s] = kept >> s & 1 ? expf(value[s] - largest) : 0.0f;
        sum += value[s];
    }
    sum = warp_sum(sum);
    for (int s = 0; s < slots; s++) {
        int expert = 32 * s + lane;
        if (expert < experts) weights[(int64)expert * rows + row] = is_finite ? value[s] / sum : nan_float();
    }
}
