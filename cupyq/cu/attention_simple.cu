// attention_simple: out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, h / group]) * v[b, j, h / group] in fp32 FMA
//
// For float32, which the tensor cores would round, bfloat16 on Turing, whose tensor cores do not know it, and 16-bit arrays
// at addresses no 16-byte access may touch.
//
// Work split  one block of 4 warps per 16 queries of one head, 4 queries a warp, keys in tiles of 32: a lane owns a key for the
//             scores, then columns lane, lane + 32, ... for the product with V.
// Numerics    fp32 throughout, weights not rounded; each tile is summed apart, then added; one rounding at the store. Key
//             order is fixed: same bits every run.
// Limits      head_dim up to HEAD <= 256, HEAD a multiple of 32; any alignment, seq, capacity, batch. out may be q.
// Traffic     2 * batch * seq * heads * head_dim values (q, out) + K and V once from memory (each block again from L2).
// Reference   cupyq/ops/attention.py: attention_reference
#include "attention.cuh"
#include "reduce.cuh"

template <typename T, int HEAD>
__global__ void __launch_bounds__(128, 2) attention_simple(
    const T *q,             // [batch, seq, heads, head_dim]
    const T *k,             // [>= batch, capacity, kv_heads, head_dim]
    const T *v,             // as k
    const int *kv_lengths,  // [batch] or null: all of capacity
    T *out,                 // as q
    int batch, int seq, int heads, int kv_heads, int head_dim, int capacity, int is_causal, int window, float scale,
    float softcap) {  // softcap 0: none
    constexpr int warps = 4, warp_rows = 4, tile_rows = 16, tile_keys = 32,
                  key_floats = HEAD + 4;  // padded: no bank conflict
    extern __shared__ __align__(16) uint8 shared[];
    float *sQ = (float *)shared;              // [tile_rows, HEAD]
    float *sK = sQ + tile_rows * HEAD;        // [tile_keys, key_floats]
    float *sW = sK + tile_keys * key_floats;  // [warps, tile_keys, warp_rows]: softmax weights

    let_next_kernel_start();
    wait_for_previous_kernel();
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int tiles_of_queries = (seq + tile_rows - 1) / tile_rows;
    int columns = batch * heads, column = blockIdx.x % columns;
    int b = column / heads, h = column % heads, kv_head = h / (heads / kv_heads);
    int first_query = (tiles_of_queries - 1 - blockIdx.x / columns) * tile_rows;
    int length = valid_length(kv_lengths, b, capacity);

    int64 query_stride = (int64)heads * head_dim, key_stride = (int64)kv_heads * head_dim;
    int64 query_offset = (int64)b * seq * query_stride + (int64)h * head_dim;
    int64 key_offset = (int64)b * capacity * key_stride + (int64)kv_head * head_dim;

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
        for (int i = threadIdx.x; i < tile_keys * HEAD; i += 32 * warps) {
            int key = first + i / HEAD, c = i % HEAD;
            bool is_valid = key < end && c < head_dim;
            sK[i / HEAD * key_floats + c] = is_valid ? to_float(k[key_offset + key * key_stride + c]) : 0;
        }
        __syncthreads();

        float dots[warp_rows][4] =
            {};  // a product in four parts, each a sum of sums of four: short chains of roundings
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
        __syncwarp();

        float part[warp_rows][HEAD / 32] = {};
        for (int j = 0; j < min(tile_keys, end - first); j++) {
            const T *row = v + key_offset + (first + j) * key_stride;
            const float *weights = sW + (warp * tile_keys + j) * warp_rows;
#pragma unroll
            for (int c = 0; c < HEAD / 32; c++) {
                float x = 32 * c + lane < head_dim ? to_float(row[32 * c + lane]) : 0;
#pragma unroll
                for (int r = 0; r < warp_rows; r++) part[r][c] = fmaf(weights[r], x, part[r][c]);
            }
        }
#pragma unroll
        for (int r = 0; r < warp_rows; r++)
            for (int c = 0; c < HEAD / 32; c++) acc[r][c] += part[r][c];
    }

#pragma unroll
    for (int r = 0; r < warp_rows; r++) {
#pragma unroll
        for (int c = 0; c < HEAD / 32; c++) {
            int query = warp_first + r, value = 32 * c + lane;
            if (query < seq && value < head_dim)  // a query without keys gives zeros
                out[query_offset + query * query_stride + value] = from_float<T>(sum[r] == 0 ? 0 : acc[r][c] / sum[r]);
        }
    }
}
