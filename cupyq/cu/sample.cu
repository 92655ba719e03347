// sample, sample_filtered: one token id per row, drawn from softmax(logits / temperature) after the filters
//
// sample           top-k, top-p, min-p
// sample_filtered  all filters of ops/sampling.py: sample, probabilities and the first tokens of the order as well
//
// Work split  one block per row, one contiguous segment of the row per warp. Passes over the row (L2 after the first):
//               maximum; histogram of 1000 bins by distance from the maximum; where at most 2048 tokens can be left, one
//               that lists them in shared memory, by id, and what follows reads that list. A cut by count or by mass:
//               three passes of radix selection, and one to find the last of several tokens tied at the cut. Filters
//               that are off cost nothing; greedy rows stop after the maximum.
// Stages      each may measure what is kept, select, and locate a token, in passes that all share (sampling_passes.cuh).
// Numerics    a token's weight is 2^40 * exp((logit - max) / temperature) as an integer, so every sum of weights is
//             exact and the same in any order; all float arithmetic is written out in single roundings that NumPy
//             repeats. The drawn id is therefore the reference's.
// Order       by logit, descending, ties by lowest id. `rank` is the logit as a uint32 that ascends so.
// Draw        the first id whose cumulative weight, in id order, exceeds floor(U * total / 2^64), U from Philox. With
//             skew: the same along the order, for another U.
// Limits      vocab <= 2^23 (totals below 2^63); top <= 1024; tail-free of more than 2048 tokens sorts in `workspace`.
// Traffic     rows * (vocab * sizeof(X) + 4) bytes from DRAM.
// Reference   cupyq/ops/sampling.py: sample_reference
#include "sampling_row.cuh"

template <typename X, int vector>
__global__ void __launch_bounds__(threads) sample(
    const X *logits,            // [rows, vocab]
    const float *temperatures,  // [rows] or null, as the five below; the number is then for all rows
    float temperature,          //
    const int *top_ks,          // [rows]
    int top_k,                  //
    const float *top_ps,        // [rows]
    float top_p,                //
    const float *min_ps,        // [rows]
    float min_p,                //
    const uint64 *seeds,        // [rows]
    uint64 seed,                //
    const uint64 *steps,        // [rows]
    uint64 step,                //
    int *out,                   // [rows]
    int vocab) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int64 row = blockIdx.x;
    if (threadIdx.x == 0) {
        shared.basics = basics_of_row(
            row, {temperatures, temperature}, {top_ks, top_k}, {top_ps, top_p}, {min_ps, min_p}, {seeds, seed},
            {steps, step});
        shared.source = {logits + row * vocab, vocab, false};
        shared.outputs.out = out + row;
    }
    __syncthreads();
    sample_row<Passes<X, vector, false>>();
}

template <typename X, int vector>
__global__ void __launch_bounds__(threads) sample_filtered(
    const X *logits,            // [rows, vocab]
    const float *temperatures,  // [rows] or null, as the five below; the number is then for all rows
    float temperature,          //
    const int *top_ks,          // [rows]
    int top_k,                  //
    const float *top_ps,        // [rows]
    float top_p,                //
    const float *min_ps,        // [rows]
    float min_p,                //
    const uint64 *seeds,        // [rows]
    uint64 seed,                //
    const uint64 *steps,        // [rows]
    uint64 step,                //
    const Filters *table,       // [rows] or null; the 13 numbers are then for all rows
    float top_a, float tfs, float typical, float mirostat_tau, float mirostat_eta, float post_temperature,
    float min_temp, float max_temp, float temp_exponent, float xtc_probability, float xtc_threshold, float smoothing,
    float skew,
    const uint8 *xtc_mask,     // [vocab] or null
    int *out,                  // [rows]
    float *mu,                 // [rows] or null, as the next three
    float *probabilities,      // [rows]
    int *top_ids,              // [rows, top_count]
    float *top_probabilities,  // [rows, top_count]
    uint32 *workspace,         // [rows, 2, vocab], only where tail-free sampling may meet more than list_size tokens
    int vocab, int top_count) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int64 row = blockIdx.x;
    auto of_row = [&](auto *values, int64 width) { return values ? values + row * width : nullptr; };
    if (threadIdx.x == 0) {
        shared.basics = basics_of_row(
            row, {temperatures, temperature}, {top_ks, top_k}, {top_ps, top_p}, {min_ps, min_p}, {seeds, seed},
            {steps, step});
        shared.filters = {top_a, tfs, typical, mirostat_tau, mirostat_eta, post_temperature, min_temp, max_temp,
            temp_exponent, xtc_probability, xtc_threshold, smoothing, skew};
        if (table) shared.filters = table[row];
        shared.source = {logits + row * vocab, vocab, false};
        shared.outputs = {out + row, of_row(mu, 1), of_row(probabilities, 1), of_row(top_ids, top_count),
            of_row(top_probabilities, top_count), top_count};
        shared.xtc_mask = xtc_mask;
        shared.workspace = of_row(workspace, 2 * (int64)vocab);
    }
    __syncthreads();
    sample_row<Passes<X, vector, true>>();
}
