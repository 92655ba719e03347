// attention_simple: out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, h / group]) * v[b, j, h / group] in fp32 FMA
//
// For float32, which the tensor cores would round, bfloat16 on Turing, whose tensor cores do not know it, 16-bit arrays at
// addresses no 16-byte access may touch, and caches without a single slot.
//
// Work split  one block of 4 warps per 16 queries of one head, 4 queries a warp, keys in tiles of 32, then their values in the
//             same place: a lane owns a key for the scores, columns lane, lane + 32, ... for the product with V.
// Numerics    fp32 throughout, weights not rounded; each tile is summed apart, then added; a sink joins the sum of weights at
//             the end; one rounding at the store. Key order is fixed, wherever pages lie: same bits every run. Codes are
//             decoded to T.
// Limits      head_dim up to HEAD <= 256, HEAD a multiple of 32; q4 and q8: a multiple of 64; any alignment, seq, capacity,
//             batch. out may be q.
// Traffic     2 * batch * seq * heads * head_dim values (q, out) + K and V once from memory (each block again from L2).
// Reference   cupyq/ops/attention.py: attention_reference
#include "attention.cuh"
#include "reduce.cuh"

// Keys (or values) `first`, first + 1, ... of a sequence as floats; those from `end` on and padding columns are zeros, unread.
template <typename T, CacheKind kind, int HEAD, int rows, int threads, typename RowOf>
__device__ __forceinline__ void load_float_tile(
    float *tile,         // [rows, HEAD + 4] in shared memory
    const void *values,  // [slots * kv_heads, head_dim] of T or codes
    const half *scales,  // of codes
    RowOf row_of, int first, int end, int head_dim) {
    if constexpr (kind == dense) {
        for (int i = threadIdx.x; i < rows * HEAD; i += threads) {
            int r = i / HEAD, c = i % HEAD;
            bool is_valid = first + r < end && c < head_dim;
            tile[r * (HEAD + 4) + c] = is_valid ? to_float(((const T *)values)[row_of(first + r) * head_dim + c]) : 0;
        }
    } else {
        static_assert(rows * HEAD / 8 % threads == 0, "lanes of a warp stay together");
        for (int i = threadIdx.x; i < rows * HEAD / 8; i += threads) {
            int r = i / (HEAD / 8), c = i % (HEAD / 8) * 8;
            bool is_valid = first + r < end && c < head_dim;
            int64 row = is_valid ? row_of(first + r) : 0;
            auto pairs = decode_stored<T, kind>(load_stored<kind, false>(values, scales, row, c, head_dim, is_valid));
            for (int e = 0; e < 8; e++)
                tile[r * (HEAD + 4) + c + e] = to_float(T{(uint16)(pairs[e / 2] >> (16 * (e % 2)))});
        }
    }
}

template <typename T, int HEAD, CacheKind k_kind, CacheKind v_kind>
__global__ void __launch_bounds__(128, 2) attention_simple(
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
    constexpr int warps = 4, warp_rows = 4, tile_rows = 16, tile_keys = 32,
                  key_floats = HEAD + 4;  // padded: no bank conflict
    extern __shared__ __align__(16) uint8 shared[];
    float *sQ = (float *)shared;              // [tile_rows, HEAD]
    float *sK = sQ + tile_rows * HEAD;        // [tile_keys, key_floats]: keys, then their values
    float *sW = sK + tile_keys * key_floats;  // [warps, tile_keys, warp_rows]: softmax weights

    let_next_kernel_start();
    wait_for_previous_kernel();
    QueryTile own = query_tile<tile_rows>(query_starts, batch, most_queries, heads);
    if (own.seq == 0) return;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int h = blockIdx.x % heads, seq = own.seq, first_query = own.first, kv_head = h / (heads / kv_heads);
    int length = valid_length(kv_lengths, own.b, capacity);
    KVPages cache = {block_table, capacity, page_shift, max_pages, pages};

    int64 query_stride = (int64)heads * head_dim;
    int64 query_offset = own.row * query_stride + (int64)h * head_dim;

    auto row_of = [&](int key) { return cache.row_of(own.b, key) * kv_heads + kv_head; };
    auto visible = [&](int query) { return visible_keys(query, seq, length, is_causal, window); };
    int begin = visible(first_query).begin, end = visible(min(first_query + tile_rows, seq) - 1).end;
    int warp_first = first_query + warp_rows * warp;

    for (int i = threadIdx.x; i < tile_rows * HEAD; i += 32 * warps) {
        int query = first_query + i / HEAD, c = i % HEAD;
        sQ[i] = query < seq && c < head_dim ? to_float(q[query_offset + query * query_stride + c]) : 0;
    }
    float acc[warp_rows][HEAD / 32] = {}, top[warp_rows], sum[warp_rows] = {};
    for (int r = 0; r < warp_rows; r++) top[r] = -infinity_float();

    for (int first = begin; first < end; first += tile_keys) {
        __syncthreads();  // the queries are there; the tile before is used up
        load_float_tile<T, k_kind, HEAD, tile_keys, 32 * warps>(sK, k, k_scales, row_of, first, end, head_dim);
        __syncthreads();

        // A product in four parts, each a sum of sums of four: short chains of roundings.
        float dots[warp_rows][4] = {};
        for (int c = 0; c < HEAD; c += 16)
#pragma unroll
            for (int part = 0; part < 4; part++) {
                float4 x = *(const float4 *)(sK + lane * key_floats + c + 4 * part);
#pragma unroll
                for (int r = 0; r < warp_rows; r++) {
                    float4 y = *(const float4 *)(sQ + (warp_rows * warp + r) * HEAD + c + 4 * part);
                    dots[r][part] += fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, x.x * y.x)));
                }
            }
#pragma unroll
        for (int r = 0; r < warp_rows; r++) {
            KeyRange keys = visible(warp_first + r);
            float score = ((dots[r][0] + dots[r][1]) + (dots[r][2] + dots[r][3])) * scale;
            if (softcap > 0) score = softcap * tanhf(score / softcap);
            if (first + lane < keys.begin || first + lane >= keys.end) score = -infinity_float();
            float highest = fmaxf(top[r], warp_max(score));
            float offset = highest == -infinity_float() ? 0 : highest;
            float weight = expf(score - offset), shrink = expf(top[r] - offset);
            top[r] = highest;
            sum[r] = sum[r] * shrink + warp_sum(weight);
#pragma unroll
            for (int c = 0; c < HEAD / 32; c++) acc[r][c] *= shrink;
            sW[(warp * tile_keys + lane) * warp_rows + r] = weight;
        }
        __syncthreads();  // the keys are used up
        load_float_tile<T, v_kind, HEAD, tile_keys, 32 * warps>(sK, v, v_scales, row_of, first, end, head_dim);
        __syncthreads();

        float part[warp_rows][HEAD / 32] = {};
        for (int j = 0; j < min(tile_keys, end - first); j++) {
            const float *weights = sW + (warp * tile_keys + j) * warp_rows;
#pragma unroll
            for (int c = 0; c < HEAD / 32; c++) {
                float x = sK[j * key_floats + 32 * c + lane];
#pragma unroll
                for (int r = 0; r < warp_rows; r++) part[r][c] = fmaf(weights[r], x, part[r][c]);
            }
        }
#pragma unroll
        for (int r = 0; r < warp_rows; r++)
            for (int c = 0; c < HEAD / 32; c++) acc[r][c] += part[r][c];
    }

    float sink = sinks ? sinks[h] : -infinity_float();
#pragma unroll
    for (int r = 0; r < warp_rows; r++) {
        float highest = fmaxf(top[r], sink), offset = highest == -infinity_float() ? 0 : highest;
        float shrink = expf(top[r] - offset), total = sum[r] * shrink + expf(sink - offset);  // no sink: 1, no change
#pragma unroll
        for (int c = 0; c < HEAD / 32; c++) {
            int query = warp_first + r, value = 32 * c + lane;
            if (query < seq && value < head_dim)  // a query without keys gives zeros
                out[query_offset + query * query_stride + value] =
                    from_float<T>(total == 0 ? 0 : acc[r][c] * shrink / total);
        }
    }
}
