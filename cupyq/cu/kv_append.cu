// kv_append: k_cache[b, positions[b] + i] = k[b, i] and the same for v; tokens outside the capacity are dropped
//
// Work split  blocks (token, 0 for k or 1 for v), up to 256 threads, one Word of 2, 4, 8 or 16 bytes each.
// Numerics    bits are copied.
// Limits      none on batch * seq (grid x); positions are never trusted: no access leaves the cache.
// Traffic     4 * batch * seq * row bytes
// Reference   cupyq/ops/kv_append.py: kv_append_reference
#include "ptx.cuh"

template <typename Word>
__global__ void __launch_bounds__(256) kv_append(
    const Word *k,         // [batch, seq, row_words]; a row is kv_heads * head_dim values
    const Word *v,         // [batch, seq, row_words]
    Word *k_cache,         // [at least batch, capacity, row_words]
    Word *v_cache,         // [at least batch, capacity, row_words]
    const int *positions,  // [batch]
    int seq, int capacity, int row_words) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int batch = blockIdx.x / seq;
    int64 position = (int64)positions[batch] + blockIdx.x % seq;
    if (position < 0 || position >= capacity) return;
    const Word *from = (blockIdx.y ? v : k) + (int64)blockIdx.x * row_words;
    Word *to = (blockIdx.y ? v_cache : k_cache) + ((int64)batch * capacity + position) * row_words;
    for (int w = threadIdx.x; w < row_words; w += blockDim.x) to[w] = from[w];
}
