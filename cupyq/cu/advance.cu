// advance: tokens[steps[b], b] = history[b, lengths[b]] = ids[b]; then positions, lengths and steps grow by 1
//
// Work split  one thread per text b
// Numerics    whole numbers
// Limits      none: counters are never trusted, what falls outside of tokens or history is dropped
// Traffic     44 * batch bytes
// Reference   cupyq/ops/advance.py: advance_reference
#include "ptx.cuh"

__global__ void __launch_bounds__(128) advance(
    const int *ids,  // [batch]
    int *positions,  // [batch]
    int *lengths,    // [batch]
    int64 *steps,    // [batch]
    int *tokens,     // [rows, batch]
    int *history,    // [batch, columns]
    int batch, int rows, int columns) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int b = blockIdx.x * 128 + threadIdx.x;
    if (b >= batch) return;
    int64 step = steps[b];
    int length = lengths[b];
    if (step >= 0 && step < rows) tokens[step * batch + b] = ids[b];
    if (length >= 0 && length < columns) history[(int64)b * columns + length] = ids[b];
    positions[b] += 1;
    lengths[b] = length + 1;
    steps[b] = step + 1;
}
