// kv_append, kv_append_codes: k_cache[b, positions[b] + i] = k[b, i] and the same for v; tokens outside the capacity are dropped
//
// Work split  kv_append: blocks (token, 0 for k or 1 for v), up to 256 threads, one Word of 2, 4, 8 or 16 bytes each.
//             kv_append_codes: the same blocks, a warp a head.
// Numerics    bits are copied, or the codes are those of formats/kv_cache.py, bit for bit.
// Limits      none on batch * seq (grid x); positions and block_table are never trusted: no access leaves the cache.
// Traffic     4 * batch * seq * row bytes; of codes, 2 * batch * seq * (row bytes + bytes of the codes and scales)
// Reference   cupyq/ops/kv_append.py: kv_append_reference
#include "kv_codec.cuh"

template <typename Word>
__global__ void __launch_bounds__(256) kv_append(
    const Word *k,           // [batch, seq, row_words]; a row is kv_heads * head_dim values
    const Word *v,           // [batch, seq, row_words]
    Word *k_cache,           // [pages, page_size, row_words]
    Word *v_cache,           // [pages, page_size, row_words]
    const int *positions,    // [batch]
    const int *block_table,  // [at least batch, max_pages]; or null: row b is the page of sequence b
    int seq, int pages, int page_size, int max_pages, int row_words) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int b = blockIdx.x / seq;
    int64 slot = token_slot(block_table, (int64)positions[b] + blockIdx.x % seq, b, pages, page_size, max_pages);
    if (slot < 0) return;
    const Word *from = (blockIdx.y ? v : k) + (int64)blockIdx.x * row_words;
    Word *to = (blockIdx.y ? v_cache : k_cache) + slot * row_words;
    for (int w = threadIdx.x; w < row_words; w += blockDim.x) to[w] = from[w];
}

// At least 4 blocks an SM: left to itself, ptxas spills to fit in 6.
template <typename T, CacheKind k_kind, CacheKind v_kind, int vector>
__global__ void __launch_bounds__(256, 4) kv_append_codes(
    const T *k,              // [batch, seq, kv_heads, head_dim]
    const T *v,              // [batch, seq, kv_heads, head_dim]
    void *k_cache,           // [pages, page_size, kv_heads, head_dim] of T, or of k_kind's codes
    half *k_scales,          // [pages, page_size, kv_heads, ...] or null, as k_kind has them
    void *v_cache,           // as k_cache
    half *v_scales,          // as k_scales
    const int *positions,    // [batch]
    const int *block_table,  // [at least batch, max_pages]; or null: row b is the page of sequence b
    int seq, int pages, int page_size, int max_pages, int kv_heads, int head_dim) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int b = blockIdx.x / seq;
    int64 slot = token_slot(block_table, (int64)positions[b] + blockIdx.x % seq, b, pages, page_size, max_pages);
    if (slot < 0) return;
    for (int head = threadIdx.x / 32; head < kv_heads; head += blockDim.x / 32) {
        int64 row = ((int64)blockIdx.x * kv_heads + head) * head_dim, to = slot * kv_heads + head;
        if (blockIdx.y)
            store_head<v_kind, vector>(v + row, v_cache, v_scales, to, head_dim);
        else
            store_head<k_kind, vector>(k + row, k_cache, k_scales, to, head_dim);
    }
}
