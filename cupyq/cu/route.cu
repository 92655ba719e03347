// route: the top_k experts of row r in ascending order, with weights softmax(logits[r])[e]; divided by their sum with
// renormalize (the sum of the full softmax then cancels)
//
// Work split  one warp per row, eight rows a block; expert e lives in lane e % 32, slot e / 32. top_k rounds of a warp-wide
//             maximum; equal logits go to the lowest expert.
// Numerics    fp32, exponentials relative to the row's maximum, sums in a fixed order. A row whose maximum is not finite
//             (NaN, +Inf, or nothing but -Inf) gets the weights NaN and the experts 0 .. top_k - 1.
// Limits      top_k <= experts <= 32 * slots, slots <= 32 (one bit each); none on rows (grid x).
// Traffic     rows * (experts * sizeof(X) + top_k * 8) bytes
// Reference   cupyq/ops/routing.py: route_reference
#include "ptx.cuh"
#include "reduce.cuh"

template <typename X, int slots>
__global__ void __launch_bounds__(256) route(
    const X *logits,  // [rows, experts]
    float *weights,   // [rows, top_k]
    int *chosen,      // [rows, top_k]
    int rows, int experts, int top_k, bool renormalize) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int64 row = (int64)blockIdx.x * 8 + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (row >= rows) return;  // whole warps leave: the shuffles below stay complete
    weights += row * top_k;
    chosen += row * top_k;

    float value[slots];
    float largest = -infinity_float();
    for (int s = 0; s < slots; s++) {
        int expert = 32 * s + lane;
        value[s] = expert < experts ? to_float(logits[row * experts + expert]) : -infinity_float();
        largest = value[s] > largest || value[s] != value[s] ? value[s] : largest;
    }
    largest = warp_max(largest);
    if (!(largest - largest == 0)) {  // nothing can be compared with NaN
        for (int i = lane; i < top_k; i += 32) weights[i] = nan_float(), chosen[i] = i;
        return;
    }

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
        if (best % 32 == lane) kept |= 1u << best / 32;
    }

    float sum = 0;
    for (int s = 0; s < slots; s++) {
        bool counts = kept >> s & 1 || !renormalize;
        value[s] = expf(value[s] - largest);
        sum += counts ? value[s] : 0.0f;
    }
    sum = warp_sum(sum);
    int before = 0;  // experts kept in lower slots
    for (int s = 0; s < slots; s++) {
        bool is_kept = kept >> s & 1;
        uint32 lanes = __ballot_sync(0xffffffffu, is_kept);
        int at = before + __popc(lanes & (1u << lane) - 1);
        if (is_kept) weights[at] = value[s] / sum, chosen[at] = 32 * s + lane;
        before += __popc(lanes);
    }
}
