// attention_decode: out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, h / group]) * v[b, j, h / group], few queries
// attention_combine: joins the parts of a row whose keys were split over several blocks
//
// Work split  the seq * group queries of one kv head are the rows of mma tiles (16 a block), so that K and V are read once for
//             all of them; their keys are cut into `splits` equal runs, one block each. The warps of a block take turns over
//             tiles of 16 keys, each with its own cp.async ring of `stages` tiles, and join through shared memory at the end.
//             With splits > 1 a block leaves (sum of weight * V, top, sum of weights) per row in `parts`; attention_combine, one
//             block per row, adds the splits in order. Runs are cut from the true length, on the device: lengths beyond what
//             the host expected only make them longer.
// Numerics    as attention_prefill; the joins of warps and splits are fp32 in a fixed order: same bits every run.
// Limits      head_dim a multiple of 8, HEAD that rounded up to 16, at most 256; 16-byte aligned arrays; any seq, capacity
//             and batch. out may be q.
// Traffic     2 * visible keys * kv_heads * head_dim values (K, V) for every 16 rows; parts: 4 * rows * splits * (head_dim + 2)
//             bytes, written and read.
// Reference   cupyq/ops/attention.py: attention_reference. Method: Flash-Decoding (pytorch.org/blog/flash-decoding).
#include "attention.cuh"
#include "reduce.cuh"

template <typename T, int HEAD, int warps, int stages>
__global__ void __launch_bounds__(32 * warps, 2) attention_decode(
    const T *q,             // [batch, seq, heads, head_dim]
    const T *k,             // [>= batch, capacity, kv_heads, head_dim]
    const T *v,             // as k
    const int *kv_lengths,  // [batch] or null: all of capacity
    T *out,                 // as q; not written where splits > 1
    float *parts,           // [rows, splits, head_dim], then [rows, splits, 2]: top, sum; rows = batch * seq * heads;
                            // null where splits == 1
    int batch, int seq, int heads, int kv_heads, int head_dim, int capacity, int is_causal, int window, float scale,
    float softcap, int splits) {
    constexpr int tile_keys = 16, row_values = HEAD + 8, tile_values = tile_keys * row_values, threads = 32 * warps;
    constexpr int part_floats = 16 * row_values + 32;  // of one warp: acc, top, sum; laid over its ring at the end
    static_assert(part_floats * 4 <= stages * 2 * tile_values * 2, "a warp's result does not fit into its ring");

    if constexpr (!on_tensor_cores<T>) return __trap();

    extern __shared__ __align__(16) uint8 shared[];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    T *ring = (T *)shared + warp * stages * 2 * tile_values;  // [stages, K and V, tile_keys, row_values]
    T *sQ = (T *)shared + warps * stages * 2 * tile_values;   // [16, row_values]

    int group = heads / kv_heads, rows = seq * group, row_tiles = (rows + 15) / 16;
    int split = blockIdx.x % splits, first_row = blockIdx.x / splits % row_tiles * 16;
    int kv_head = blockIdx.x / splits / row_tiles % kv_heads, b = blockIdx.x / splits / row_tiles / kv_heads;
    int length = valid_length(kv_lengths, b, capacity);
    Logits logits(scale, softcap);

    // Row r is head r % group of this kv head at query r / group.
    auto query_row = [&](int r) { return ((int64)b * seq + r / group) * heads + kv_head * group + r % group; };
    auto visible = [&](int r) { return visible_keys(r / group, seq, length, is_causal, window); };
    int begin = visible(first_row).begin, end = visible(min(first_row + 16, rows) - 1).end;
    int keys_per_split = end > begin ? (end - begin + splits - 1) / splits : 0;
    keys_per_split = (keys_per_split + tile_keys * warps - 1) / (tile_keys * warps) * (tile_keys * warps);
    // Whole tiles for every warp: only the last run ends inside of a tile, where the masks of the rows end too.
    begin += split * keys_per_split;
    end = min(end, begin + keys_per_split);
    int warp_begin = begin + warp * tile_keys;  // every warps-th tile of the run
    int tiles = end > warp_begin ? (end - warp_begin + tile_keys * warps - 1) / (tile_keys * warps) : 0;

    int64 key_stride = (int64)kv_heads * head_dim;
    int64 key_offset = (int64)b * capacity * key_stride + (int64)kv_head * head_dim;
    auto load_keys = [&](int tile) {
        int first = warp_begin + tile * tile_keys * warps;
        T *stage = ring + tile % stages * 2 * tile_values;
        load_tile<T, HEAD, tile_keys, 32>(stage, k + key_offset, key_stride, first, end, head_dim, lane);
        load_tile<T, HEAD, tile_keys, 32>(stage + tile_values, v + key_offset, key_stride, first, end, head_dim, lane);
    };

    for (int chunk = threadIdx.x; chunk < 16 * HEAD / 8; chunk += threads) {
        int r = chunk / (HEAD / 8), c = chunk % (HEAD / 8) * 8;
        bool is_valid = first_row + r < rows && c < head_dim;
        copy_async_16(sQ + r * row_values + c, q + query_row(first_row + r) * head_dim + c, is_valid);
    }
    copy_async_commit();
#pragma unroll
    for (int tile = 0; tile < stages - 1; tile++) {
        if (tile < tiles) load_keys(tile);
        copy_async_commit();
    }
    copy_async_wait<stages - 1>();  // the queries
    __syncthreads();
    Queries<T, HEAD> queries;
    queries.load(sQ);
    const KeyRange row_keys[2] = {visible(first_row + lane / 4), visible(first_row + lane / 4 + 8)};
    SoftmaxRows<T, HEAD> softmax;
    softmax.clear();

    for (int tile = 0; tile < tiles; tile++) {
        copy_async_wait<stages - 2>();
        __syncwarp();  // this tile has arrived for all lanes, and all are done with the one before, whose place comes free
        if (tile + stages - 1 < tiles) load_keys(tile + stages - 1);
        copy_async_commit();
        const T *stage = ring + tile % stages * 2 * tile_values;
        int first = warp_begin + tile * tile_keys * warps;
        softmax.template add<tile_keys>(queries, stage, stage + tile_values, row_keys, true, first, logits);
    }

    // --- join the warps, in warp order ---
    copy_async_wait<0>();
    __syncwarp();  // lanes may still be reading the ring; the other warps have rings of their own
    float *warp_part = (float *)ring;
    for (int half = 0; half < 2; half++) {
        int r = lane / 4 + 8 * half;
        float total = softmax.total(half);
        if (lane % 4 == 0) {
            warp_part[16 * row_values + r] = softmax.top[half] * logits.multiplier;
            warp_part[16 * row_values + 16 + r] = total;
        }
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++)
            for (int e = 0; e < 2; e++)
                warp_part[r * row_values + 8 * n + lane % 4 * 2 + e] = softmax.acc[n][2 * half + e];
    }
    __syncthreads();

    int64 rows_of_all = (int64)batch * seq * heads;
    for (int i = threadIdx.x; i < 16 * head_dim; i += threads) {
        int r = i / head_dim, column = i % head_dim;
        if (first_row + r >= rows) break;
        auto part = [&](int w, int index) { return ((const float *)shared)[w * stages * tile_values + index]; };
        float top = -infinity_float(), sum = 0, acc = 0;
        for (int w = 0; w < warps; w++) top = fmaxf(top, part(w, 16 * row_values + r));
        float offset = top == -infinity_float() ? 0 : top;
        for (int w = 0; w < warps; w++) {
            float weight = exp2_fast(part(w, 16 * row_values + r) - offset);
            sum += weight * part(w, 16 * row_values + 16 + r);
            acc += weight * part(w, r * row_values + column);
        }
        int64 row = query_row(first_row + r);
        if (splits == 1) {
            out[row * head_dim + column] = from_float<T>(acc * inverse_sum(sum));
        } else {
            parts[(row * splits + split) * head_dim + column] = acc;
            if (column < 2)
                parts[rows_of_all * splits * head_dim + (row * splits + split) * 2 + column] = column ? sum : top;
        }
    }
}

template <typename T>
__global__ void attention_combine(
    const float *parts,  // [rows, splits, head_dim] and [rows, splits, 2], as attention_decode left them
    T *out,              // [rows, head_dim]
    int splits, int head_dim) {
    int64 row = blockIdx.x, rows = gridDim.x;
    const float *stats = parts + rows * splits * head_dim + row * splits * 2;  // [splits, (top, sum)]
    const float *accs = parts + row * splits * head_dim;                       // [splits, head_dim]
    float top = -infinity_float();
    for (int s = threadIdx.x % 32; s < splits; s += 32) top = fmaxf(top, stats[2 * s]);
    top = warp_max(top);
    float offset = top == -infinity_float() ? 0 : top;
    if (threadIdx.x >= head_dim) return;
    float sum = 0, acc = 0;
#pragma unroll 4
    for (int s = 0; s < splits; s++) {
        float weight = exp2_fast(stats[2 * s] - offset);
        sum += weight * stats[2 * s + 1];
        acc += weight * accs[s * head_dim + threadIdx.x];
    }
    out[row * head_dim + threadIdx.x] = from_float<T>(acc * inverse_sum(sum));
}
