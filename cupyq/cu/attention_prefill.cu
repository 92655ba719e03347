// attention_prefill: out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, h / group]) * v[b, j, h / group], many queries
//
// Work split  one block of `warps` warps per 16 * warps queries of one head; each warp owns 16 queries and walks the visible
//             keys in tiles of tile_keys, double-buffered with cp.async; tiles nobody in the block (or warp) sees are skipped.
//             Long blocks (late queries) start first, so that the last wave is made of short ones.
// Numerics    products of 16-bit values summed in fp32; online softmax in fp32, base 2; weights rounded to T for the product
//             with V, their sum not; a sink joins that sum at the end; one rounding at the store. Key order is fixed, wherever
//             pages lie: same bits every run. Codes are decoded to T while a tile comes in: the bits of a decoded cache.
// Limits      head_dim a multiple of 8, HEAD that rounded up to 16, at most 256; q4 and q8: a multiple of 64; 16-byte aligned
//             arrays; any seq, capacity and batch. out may be q.
// Traffic     2 * batch * seq * heads * head_dim values (q, out) + K and V once from memory (each block again from L2);
//             4 * head_dim flops per visible (query, key) pair and head.
// Reference   cupyq/ops/attention.py: attention_reference. Method: FlashAttention-2, arXiv 2307.08691.
#include "attention.cuh"

// One block a multiprocessor is enough to ask for: left to itself, ptxas presses narrow heads into 128 registers, and spills.
template <typename T, int HEAD, int warps, int tile_keys, CacheKind k_kind, CacheKind v_kind>
__global__ void __launch_bounds__(32 * warps, 1) attention_prefill(
    const T *q,             // [batch, most_queries, heads, head_dim]; with query_starts [most_queries, heads, head_dim]
    const void *k,          // [pages, page size, kv_heads, head_dim] of T, or codes
    const half *k_scales,   // of codes
    const void *v,          // as k
    const half *v_scales,   // as k_scales
    const int *kv_lengths,  // [batch] or null: all of capacity
    const int *block_table,   // [batch, max_pages] or null: page b is sequence b, its size the capacity
    const int *query_starts,  // [batch + 1] or null
    const float *sinks,       // [heads] or null
    T *out,                   // as q
    int batch, int most_queries, int heads, int kv_heads, int head_dim, int capacity, int page_shift, int max_pages,
    int pages, int is_causal, int window, float scale, float softcap) {  // softcap 0: none
    constexpr int tile_rows = 16 * warps, threads = 32 * warps, row_values = HEAD + 8;
    constexpr bool overlays = HEAD <= 128;  // the queries leave shared memory before the first keys enter
    static_assert(!overlays || tile_rows <= 4 * tile_keys, "queries do not fit where the keys go");

    let_next_kernel_start();
    wait_for_previous_kernel();
    if constexpr (!on_tensor_cores<T>) return __trap();

    extern __shared__ __align__(16) uint8 shared[];
    T *sK = (T *)shared;                                      // [2, tile_keys, row_values]
    T *sV = sK + 2 * tile_keys * row_values;                  // [2, tile_keys, row_values]
    T *sQ = overlays ? sK : sV + 2 * tile_keys * row_values;  // [tile_rows, row_values]

    QueryTile own = query_tile<tile_rows>(query_starts, batch, most_queries, heads);
    if (own.seq == 0) return;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int h = blockIdx.x % heads, seq = own.seq, first_query = own.first, kv_head = h / (heads / kv_heads);
    int length = valid_length(kv_lengths, own.b, capacity);
    Logits logits(scale, softcap);
    KVPages cache = {block_table, capacity, page_shift, max_pages, pages};

    int64 query_stride = (int64)heads * head_dim;
    int64 query_offset = own.row * query_stride + (int64)h * head_dim;

    auto visible = [&](int query) { return visible_keys(query, seq, length, is_causal, window); };
    int begin = visible(first_query).begin;                        // of the whole block:
    int end = visible(min(first_query + tile_rows, seq) - 1).end;  // ranges grow with the query
    int tiles = end > begin ? (end - begin + tile_keys - 1) / tile_keys : 0;

    auto row_of = [&](int key) { return cache.row_of(own.b, key) * kv_heads + kv_head; };
    auto load_keys = [&](int tile) {
        int first = begin + tile * tile_keys, stage = tile % 2 * tile_keys * row_values;
        load_cache_tiles<T, k_kind, v_kind, HEAD, tile_keys, threads>(
            sK + stage, sV + stage, k, k_scales, v, v_scales, row_of, first, end, head_dim);
    };

    load_tile<T, HEAD, tile_rows, threads>(sQ, q + query_offset, query_stride, first_query, seq, head_dim, threadIdx.x);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    Queries<T, HEAD> queries;
    queries.load(sQ + 16 * warp * row_values);
    if (overlays) __syncthreads();

    int warp_first = first_query + 16 * warp;
    KeyRange earliest = visible(warp_first), latest = visible(warp_first + 15);
    const KeyRange rows[2] = {visible(warp_first + lane / 4), visible(warp_first + lane / 4 + 8)};
    SoftmaxRows<T, HEAD> softmax;
    softmax.clear();

    if (tiles > 0) load_keys(0);
    copy_async_commit();
    for (int tile = 0; tile < tiles; tile++) {
        copy_async_wait<0>();
        __syncthreads();  // this tile has arrived for all, and all are done with the one before, whose place comes free
        if (tile + 1 < tiles) load_keys(tile + 1);
        copy_async_commit();
        int first = begin + tile * tile_keys, last = first + tile_keys - 1;
        bool is_seen = warp_first < seq && first < latest.end && last >= earliest.begin;
        bool needs_mask = first < latest.begin || last >= earliest.end;
        int stage = tile % 2 * tile_keys * row_values;
        if (is_seen) softmax.template add<tile_keys>(queries, sK + stage, sV + stage, rows, needs_mask, first, logits);
    }

    float sink = sink_exponent(sinks, blockIdx.x % heads);
    for (int half = 0; half < 2; half++) {
        float top = softmax.top[half] * logits.multiplier;
        float inverse = inverse_sum_with_sink(softmax.total(half), top, sink);
        int query = warp_first + lane / 4 + 8 * half;
        T *row = out + query_offset + query * query_stride + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++) {
            uint32 pair = pack_pair<T>(softmax.acc[n][2 * half] * inverse, softmax.acc[n][2 * half + 1] * inverse);
            // HEAD is head_dim rounded up to 16: only the last 8 columns may be padding.
            if (query < seq && (n < HEAD / 8 - 1 || head_dim == HEAD)) *(uint32 *)(row + 8 * n) = pair;
        }
    }
}
