// attention_decode: out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, h / group]) * v[b, j, h / group], few queries
//
// Work split  the seq * group queries of one kv head are the rows of mma tiles (16 a block), so that K and V are read once for
//             all of them; the visible keys, in tiles of 16, are shared out evenly over up to `splits` blocks. How many take
//             part follows from the true length, on the device: 4 tiles make a share, unless there are more than `splits`;
//             the other blocks end at once. So a launch made for longer caches computes the same bits. The warps of a block
//             take turns over its tiles, each with its own cp.async ring of `stages` tiles, and join through shared memory.
//             A block that is not alone leaves (sum of weight * V, top, sum of weights) per row in `parts`; the last one to
//             arrive adds the shares in order.
// Numerics    as attention_prefill; the joins of warps and shares are fp32 in a fixed order: same bits every run.
// Limits      head_dim a multiple of 8, HEAD that rounded up to 16, at most 256; 16-byte aligned arrays; any seq, capacity
//             and batch. out may be q.
// Traffic     2 * visible keys * kv_heads * head_dim values (K, V) for every 16 rows; parts: 4 * rows * shares * (head_dim + 2)
//             bytes, written and read.
// Reference   cupyq/ops/attention.py: attention_reference. Method: Flash-Decoding (pytorch.org/blog/flash-decoding).
#include "attention.cuh"

// How many blocks share `tile_count` tiles of keys. What each leaves for the last one to add grows with `rows`: with many rows
// more shares than about sqrt(2 keys / rows) would cost more than they save. In Python: most_shares in ops/attention.py.
__device__ __forceinline__ int share_count(int tile_count, int rows, int splits) {
    int useful = (int)sqrtf(32.0f * tile_count / rows) + 1;
    return max(1, min(min(splits, useful), (tile_count + 3) / 4));
}

template <typename T, int HEAD, int warps, int stages>
__global__ void __launch_bounds__(32 * warps, warps > 4 ? 1 : 2) attention_decode(
    const T *q,             // [batch, seq, heads, head_dim]
    const T *k,             // [>= batch, capacity, kv_heads, head_dim]
    const T *v,             // as k
    const int *kv_lengths,  // [batch] or null: all of capacity
    T *out,                 // as q
    float *parts,           // [rows, splits, head_dim], then [rows, splits, 2]: top, sum; rows = batch * seq * heads
    uint32 *arrived,  // a counter per 16 rows of a kv head: zero before and after; null, as parts, where splits == 1
    int batch, int seq, int heads, int kv_heads, int head_dim, int capacity, int is_causal, int window, float scale,
    float softcap, int splits) {
    constexpr int tile_keys = 16, row_values = HEAD + 8, tile_values = tile_keys * row_values, threads = 32 * warps;
    constexpr int part_floats = 16 * row_values + 32;  // of one warp: acc, top, sum; laid over its ring at the end
    static_assert(part_floats * 4 <= stages * 2 * tile_values * 2, "a warp's result does not fit into its ring");

    let_next_kernel_start();
    wait_for_previous_kernel();
    if constexpr (!on_tensor_cores<T>) return __trap();

    extern __shared__ __align__(16) uint8 shared[];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    T *ring = (T *)shared + warp * stages * 2 * tile_values;  // [stages, K and V, tile_keys, row_values]
    T *sQ = (T *)shared + warps * stages * 2 * tile_values;   // [16, row_values]

    // Neighbouring blocks read neighbouring heads of the same keys.
    int group = heads / kv_heads, rows = seq * group, row_tiles = (rows + 15) / 16;
    int kv_head = blockIdx.x % kv_heads, split = blockIdx.x / kv_heads % splits;
    int first_row = blockIdx.x / kv_heads / splits % row_tiles * 16, b = blockIdx.x / kv_heads / splits / row_tiles;
    int row_count = min(16, rows - first_row);
    int length = valid_length(kv_lengths, b, capacity);
    Logits logits(scale, softcap);

    // Row r is head r % group of this kv head at query r / group.
    auto query_row = [&](int r) { return ((int64)b * seq + r / group) * heads + kv_head * group + r % group; };
    for (int chunk = threadIdx.x; chunk < 16 * HEAD / 8; chunk += threads) {
        int r = chunk / (HEAD / 8), c = chunk % (HEAD / 8) * 8;
        bool is_valid = r < row_count && c < head_dim;
        copy_async_16(sQ + r * row_values + c, q + query_row(first_row + r) * head_dim + c, is_valid);
    }
    copy_async_commit();

    // --- this block's share of the keys, and this warp's tiles of it ---
    auto visible = [&](int r) { return visible_keys(r / group, seq, length, is_causal, window); };
    int begin = visible(first_row).begin, end = visible(first_row + row_count - 1).end;
    int tile_count = end > begin ? (end - begin + tile_keys - 1) / tile_keys : 0;
    int shares = share_count(tile_count, row_count, splits);
    if (split >= shares) return copy_async_wait<0>();
    int own_tiles = tile_count / shares, longer = tile_count % shares;  // the first `longer` shares have one tile more
    begin += (split * own_tiles + min(split, longer)) * tile_keys;
    own_tiles += split < longer;
    end = min(end, begin + own_tiles * tile_keys);
    int warp_begin = begin + warp * tile_keys;  // every warps-th tile of the share
    int tiles = own_tiles > warp ? (own_tiles - warp + warps - 1) / warps : 0;

    int64 key_stride = (int64)kv_heads * head_dim;
    int64 first_key = ((int64)b * capacity + warp_begin) * key_stride + (int64)kv_head * head_dim;
    int warp_end = end - warp_begin;  // keys count from the warp's first one
    auto load_keys = [&](int tile) {
        int first = tile * tile_keys * warps;
        T *stage = ring + tile % stages * 2 * tile_values;
        load_tile<T, HEAD, tile_keys, 32>(stage, k + first_key, key_stride, first, warp_end, head_dim, lane);
        load_tile<T, HEAD, tile_keys, 32>(
            stage + tile_values, v + first_key, key_stride, first, warp_end, head_dim, lane);
    };
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
        if (r >= row_count) continue;
        if (lane % 4 == 0) {
            warp_part[16 * row_values + r] = softmax.top[half] * logits.multiplier;
            warp_part[16 * row_values + 16 + r] = total;
        }
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++)
            *(float2 *)(warp_part + r * row_values + 8 * n + lane % 4 * 2) =
                make_float2(softmax.acc[n][2 * half], softmax.acc[n][2 * half + 1]);
    }
    __syncthreads();

    int pairs = head_dim / 2;  // of columns
    float2 *stats = (float2 *)(parts + (int64)batch * seq * heads * splits * head_dim);
    auto write = [&](int64 row, int column, float2 acc, float sum) {
        float inverse = inverse_sum(sum);
        *(uint32 *)(out + row * head_dim + column) = pack_pair<T>(acc.x * inverse, acc.y * inverse);
    };
    for (int i = threadIdx.x; i < row_count * pairs; i += threads) {
        int r = i / pairs, column = i % pairs * 2;
        auto part = [&](int w) { return (const float *)shared + w * stages * tile_values; };
        float top = -infinity_float(), sum = 0;
        float2 acc = make_float2(0, 0);
        for (int w = 0; w < warps; w++) top = fmaxf(top, part(w)[16 * row_values + r]);
        float offset = top == -infinity_float() ? 0 : top;
        for (int w = 0; w < warps; w++) {
            float weight = exp2_fast(part(w)[16 * row_values + r] - offset);
            float2 values = *(const float2 *)(part(w) + r * row_values + column);
            sum += weight * part(w)[16 * row_values + 16 + r];
            acc.x += weight * values.x, acc.y += weight * values.y;
        }
        int64 row = query_row(first_row + r);
        if (shares == 1) {
            write(row, column, acc, sum);
        } else {
            *(float2 *)(parts + (row * splits + split) * head_dim + column) = acc;
            if (column == 0) stats[row * splits + split] = make_float2(top, sum);
        }
    }
    if (shares == 1) return;

    // --- the last share to arrive adds all of them, in order ---
    __threadfence();
    __syncthreads();
    bool *is_last = (bool *)sQ;  // the queries are used up
    if (threadIdx.x == 0) {
        uint32 *counter = arrived + (b * row_tiles + first_row / 16) * kv_heads + kv_head;
        *is_last = atomicAdd(counter, 1u) == shares - 1;
        if (*is_last) *counter = 0;
    }
    __syncthreads();
    if (!*is_last) return;
    __threadfence();
    constexpr int batch_shares = 16;  // loads in flight
    for (int i = threadIdx.x; i < row_count * pairs; i += threads) {
        int column = i % pairs * 2;
        int64 row = query_row(first_row + i / pairs);
        float top = -infinity_float(), sum = 0;
        float2 acc = make_float2(0, 0);
        for (int first = 0; first < shares; first += batch_shares) {
            float2 stat[batch_shares], values[batch_shares];
#pragma unroll
            for (int s = 0; s < batch_shares; s++) {
                stat[s] = make_float2(-infinity_float(), 0), values[s] = make_float2(0, 0);
                if (first + s < shares) {
                    stat[s] = __ldcg(stats + row * splits + first + s);
                    values[s] = __ldcg((const float2 *)(parts + (row * splits + first + s) * head_dim + column));
                }
            }
            float highest = top;
#pragma unroll
            for (int s = 0; s < batch_shares; s++) highest = fmaxf(highest, stat[s].x);
            float offset = highest == -infinity_float() ? 0 : highest;
            float shrink = exp2_fast(top - offset);
            top = highest, sum *= shrink, acc.x *= shrink, acc.y *= shrink;
#pragma unroll
            for (int s = 0; s < batch_shares; s++) {
                float weight = exp2_fast(stat[s].x - offset);
                sum += weight * stat[s].y, acc.x += weight * values[s].x, acc.y += weight * values[s].y;
            }
        }
        write(row, column, acc, sum);
    }
}
