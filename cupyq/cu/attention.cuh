// What the attention kernels share: who sees which key, tiles of the KV cache in shared memory (from values or from codes),
// and the online softmax of 16 query rows against one tile of keys on tensor cores.
//
// A tile holds `rows` rows of HEAD values in shared memory, HEAD = head_dim rounded up to 16, each row padded by 16 bytes:
// eight consecutive rows then start in eight different 16-byte columns, so ldmatrix meets no bank conflict.
//
// Scores leave the tensor cores as raw q . k. The softmax is taken in base 2: weight = 2^(multiplier * (score - top)), with
// scale and log2(e) in the multiplier, one fma and one ex2 per score. A softcap replaces the score first (Logits).
#pragma once
#include "kv_codec.cuh"
#include "kv_view.cuh"

// Turing's tensor cores multiply no bfloat16, and exchanging values between lanes instead takes a minute to compile: there
// attention_simple does bfloat16, and the kernels here are empty.
#if __CUDA_ARCH__ >= 800
template <typename T> constexpr bool on_tensor_cores = true;
#else
template <typename T> constexpr bool on_tensor_cores = false;
template <> constexpr bool on_tensor_cores<half> = true;
#endif

// --- masks ---

struct KeyRange {
    int begin, end;
};  // keys begin <= j < end; empty where end <= begin

// Query i of a batch row stands at position p = length - seq + i. It sees keys p - window < j, and j <= p where causal.
__device__ __forceinline__ KeyRange visible_keys(int query, int seq, int length, bool is_causal, int window) {
    int position = length - seq + query;
    return {max(0, position - window + 1), is_causal ? min(position + 1, length) : length};
}

// The valid keys of one batch row: all where no lengths were given, and never outside of the cache.
__device__ __forceinline__ int valid_length(const int *kv_lengths, int row, int capacity) {
    return kv_lengths ? min(max(kv_lengths[row], 0), capacity) : capacity;
}

// --- who computes what ---

// Queries `first`, first + 1, ... of sequence b, which has `seq` of them. Its query 0 is row `row` of q.
struct QueryTile {
    int b, first, seq;
    int64 row;
};

// The tile of `tile_rows` queries that this block is for; its head is blockIdx.x % heads. Sequences of equal lengths: long tiles (late queries) of all of them
// start first. With query_starts: as many blocks were launched as there may be tiles; a block without one finds seq = 0. All
// lanes of a warp must call together.
template <int tile_rows>
__device__ __forceinline__ QueryTile query_tile(
    const int *query_starts,  // [batch + 1] or null
    int batch, int most_queries, int heads) {
    if (!query_starts) {
        int columns = batch * heads, b = blockIdx.x % columns / heads;
        int tiles = (most_queries + tile_rows - 1) / tile_rows;
        int first = (tiles - 1 - (int)blockIdx.x / columns) * tile_rows;
        return {b, first, most_queries, (int64)b * most_queries};
    }
    int index = (gridDim.x - 1 - blockIdx.x) / heads, lane = threadIdx.x % 32;
    for (int base = 0, before = 0; base < batch; base += 32) {  // a sequence per lane
        int start = 0, end = 0;
        if (base + lane < batch) {  // whatever the table says, rows stay inside of q
            start = min(max(query_starts[base + lane], 0), most_queries);
            end = min(max(query_starts[base + lane + 1], start), most_queries);
        }
        int tiles = (end - start + tile_rows - 1) / tile_rows, sum = tiles;
        for (int step = 1; step < 32; step *= 2) {
            int others = __shfl_up_sync(0xffffffffu, sum, step);
            if (lane >= step) sum += others;
        }
        uint32 reached = __ballot_sync(0xffffffffu, index < before + sum);
        if (reached) {
            int owner = __ffs(reached) - 1;
            int first = __shfl_sync(0xffffffffu, (index - before - sum + tiles) * tile_rows, owner);
            int seq = __shfl_sync(0xffffffffu, end - start, owner), row = __shfl_sync(0xffffffffu, start, owner);
            return {base + owner, first, seq, row};
        }
        before += __shfl_sync(0xffffffffu, sum, 31);
    }
    return {0, 0, 0, 0};
}

// --- arithmetic ---

// 2^x for x <= 0: 2 ulp, and exactly 0 at minus infinity.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float sqrt_fast(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// pack_pair in one instruction, where there is one.
template <typename T> __device__ __forceinline__ uint32 pack_weights(float low, float high) {
    return pack_pair<T>(low, high);
}
#if __CUDA_ARCH__ >= 800
template <> __device__ __forceinline__ uint32 pack_weights<half>(float low, float high) {
    uint32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <> __device__ __forceinline__ uint32 pack_weights<bfloat16>(float low, float high) {
    uint32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
#endif

// Turns raw scores into exponents of two: exponent = multiplier * capped(raw).
// With a softcap c, c * tanh(raw * scale / c) is written as c * (1 - 2 / (1 + 2^(2 log2(e) scale / c * raw))), whose error is
// absolute (about 1e-7 c): far below what rounding the weights to 16 bits costs.
struct Logits {
    float multiplier, inner, cap;
    __device__ __forceinline__ Logits(float scale, float softcap) {
        const float log2_e = 1.4426950408889634f;
        cap = softcap * log2_e;
        inner = softcap > 0 ? 2 * log2_e * scale / softcap : 0;
        multiplier = softcap > 0 ? 1 : scale * log2_e;
    }
    __device__ __forceinline__ float capped(float raw) const {
        return cap * (1 - __fdividef(2.0f, 1 + exp2_fast(inner * raw)));
    }
};

// --- tiles ---

// Copy `rows` rows of one head, starting at row `first`, into a tile, by `threads` threads (this one is `thread`).
// Rows from `end` on and columns from head_dim on become zeros and are not read: whatever an unused cache slot holds,
// NaN included, stays out of the product of a zero weight and V.
template <typename T, int HEAD, int rows, int threads>
__device__ __forceinline__ void load_tile(
    T *tile,        // [rows, HEAD + 8] in shared memory
    const T *head,  // row j at head + j * row_stride
    int64 row_stride, int first, int end, int head_dim, int thread) {
    constexpr int chunks = HEAD / 8;  // 16-byte pieces of a row; a thread keeps its column
    constexpr int step = threads / chunks;
    static_assert(step > 0, "a row needs more threads than there are");
    int row = thread / chunks, column = thread % chunks * 8;
    if (threads % chunks && row >= step) return;
    const T *source = head + (first + row) * row_stride + column;
    T *target = tile + row * (HEAD + 8) + column;
#pragma unroll
    for (int r = 0; r < rows; r += step) {
        if (rows % step == 0 || row + r < rows)
            copy_async_16(target + r * (HEAD + 8), source + r * row_stride, first + row + r < end && column < head_dim);
    }
}

// --- keys and values of a cache ---

template <CacheKind kind> struct KindOf {
    static constexpr CacheKind value = kind;
};

// A lane's 8 values of a cache of codes, as stored.
template <CacheKind kind> struct StoredValues {
    LaneCodes<kind> codes;
    half scale;
};

// The 8 codes from `column` on of row `row`; zeros, unread, where `is_valid` is false.
template <CacheKind kind, bool aligned>
__device__ __forceinline__ StoredValues<kind> load_stored(
    const void *codes, const half *scales, int64 row, int column, int head_dim, bool is_valid) {
    StoredValues<kind> stored = {};
    if (!is_valid) return stored;
    int64 first = row * head_dim + column;
    stored.codes = load_words<aligned, LaneCodes<kind>>((const uint8 *)codes + (kind == q4 ? first / 2 : first));
    if (kind == e4m3) stored.scale = scales[row];
    if (kind == q4 || kind == q8) stored.scale = scales[first / group_values];
    return stored;
}

// All lanes of a warp must call together; 8 neighbours hold a chunk where the kind has chunks.
template <typename T, CacheKind kind>
__device__ __forceinline__ LaneValues decode_stored(const StoredValues<kind> &stored) {
    LaneValues pairs;
    if constexpr (kind == fp8) {
        pairs = decode_fp8(stored.codes);
    } else if constexpr (kind == e4m3) {
        float scale = to_float(stored.scale);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32 two = stored.codes[i / 2] >> (16 * (i % 2));
            pairs[i] = pack_pair<half>(e4m3_value(two & 0xffu) * scale, e4m3_value(two >> 8 & 0xffu) * scale);
        }
    } else {
        pairs = decode_chunk<kind>(stored.codes, stored.scale);
    }
    if constexpr (!is_same<T, half>) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            pairs[i] = pack_pair<T>(to_float(half{(uint16)pairs[i]}), to_float(half{(uint16)(pairs[i] >> 16)}));
    }
    return pairs;
}

// Keys `first`, first + 1, ... of a sequence, and their values, into tiles of `rows`, by all `threads` threads of the block.
// Key j is row row_of(j) of the cache, for one head. Those from `end` on and columns from head_dim on become zeros and are not
// read: whatever an unused slot holds, NaN included, stays out of the product of a zero weight and V. 16-bit values come by
// copy_async; codes are decoded on the way.
template <typename T, CacheKind k_kind, CacheKind v_kind, int HEAD, int rows, int threads, typename RowOf>
__device__ __forceinline__ void load_cache_tiles(
    T *sK,                 // [rows, HEAD + 8] in shared memory
    T *sV,                 // as sK
    const void *k,         // [slots * kv_heads, head_dim] of T or codes
    const half *k_scales,  // of codes
    const void *v,         // as k
    const half *v_scales,  // as k_scales
    RowOf row_of, int first, int end, int head_dim) {
    constexpr int columns = HEAD / 8;  // of 8 values
    constexpr int total = rows * columns, turns = (total + threads - 1) / threads;
    constexpr int together = turns % 4 == 0 ? 4 : turns;  // loads on their way before what they bring is stored
    static_assert(total % 32 == 0, "lanes of a warp stay together");
#pragma unroll 1
    for (int begin = threadIdx.x; begin < turns * threads; begin += together * threads) {
        int64 row[together];
        bool is_valid[together];
        StoredValues<k_kind> stored_k[together];
        StoredValues<v_kind> stored_v[together];
        auto column = [&](int turn) { return (begin + turn * threads) % columns * 8; };
        auto target = [&](int turn) { return (begin + turn * threads) / columns * (HEAD + 8) + column(turn); };
        auto is_inside = [&](int turn) { return total % threads == 0 || begin + turn * threads < total; };
#pragma unroll
        for (int turn = 0; turn < together; turn++) {
            int key = first + (begin + turn * threads) / columns;
            is_valid[turn] = is_inside(turn) && key < end && column(turn) < head_dim;
            row[turn] = is_valid[turn] ? row_of(key) : 0;
        }
        auto fetch = [&](auto kind, T *tile, const void *values, const half *scales, auto &stored) {
#pragma unroll
            for (int turn = 0; turn < together; turn++) {
                if constexpr (kind.value == dense) {
                    const T *source = (const T *)values + row[turn] * head_dim + (is_valid[turn] ? column(turn) : 0);
                    if (is_inside(turn)) copy_async_16(tile + target(turn), source, is_valid[turn]);
                } else {
                    stored[turn] = load_stored<kind.value, true>(
                        values, scales, row[turn], column(turn), head_dim, is_valid[turn]);
                }
            }
        };
        auto store = [&](auto kind, T *tile, auto &stored) {
#pragma unroll
            for (int turn = 0; turn < together; turn++)
                if constexpr (kind.value != dense) {
                    LaneValues pairs = decode_stored<T, kind.value>(stored[turn]);
                    if (is_inside(turn)) *(LaneValues *)(tile + target(turn)) = pairs;
                }
        };
        fetch(KindOf<k_kind>(), sK, k, k_scales, stored_k);
        fetch(KindOf<v_kind>(), sV, v, v_scales, stored_v);
        store(KindOf<k_kind>(), sK, stored_k);
        store(KindOf<v_kind>(), sV, stored_v);
    }
}

// The four 8 x 8 matrices of a 16 x 16 piece of a tile at (row, column): as the A operand of mma, or transposed as two B
// operands whose k axis runs along the tile's rows (V) ...
template <bool transposed, typename T, int HEAD>
__device__ __forceinline__ void load_row_major(uint32 (&r)[4], const T *tile, int row, int column) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4<transposed>(r, tile + (row + lane % 16) * (HEAD + 8) + column + lane / 16 * 8);
}
// ... or as two B operands whose k axis runs along the tile's columns (K).
template <typename T, int HEAD>
__device__ __forceinline__ void load_column_major(uint32 (&r)[4], const T *tile, int row, int column) {
    int lane = threadIdx.x % 32;
    ldmatrix_x4(r, tile + (row + lane % 8 + lane / 16 * 8) * (HEAD + 8) + column + lane / 8 % 2 * 8);
}

// 16 query rows as A operands: in registers where they fit beside the accumulator, else read again for each tile.
template <typename T, int HEAD, bool in_registers = (HEAD <= 128)> struct Queries;
template <typename T, int HEAD> struct Queries<T, HEAD, true> {
    uint32 fragments[HEAD / 16][4];
    __device__ __forceinline__ void load(const T *tile) {
#pragma unroll
        for (int k = 0; k < HEAD / 16; k++) load_row_major<false, T, HEAD>(fragments[k], tile, 0, 16 * k);
    }
    __device__ __forceinline__ void get(uint32 (&r)[4], int k) const {
#pragma unroll
        for (int i = 0; i < 4; i++) r[i] = fragments[k][i];
    }
};
template <typename T, int HEAD> struct Queries<T, HEAD, false> {
    const T *rows;
    __device__ __forceinline__ void load(const T *tile) { rows = tile; }
    __device__ __forceinline__ void get(uint32 (&r)[4], int k) const {
        load_row_major<false, T, HEAD>(r, rows, 0, 16 * k);
    }
};

// --- online softmax ---

// What one warp knows of 16 query rows after some keys. Lane 4 * group + t holds rows group and group + 8 (index `half`), in
// the layout of mma's D: acc[n][2 * half + e] is column 8 n + 2 t + e. `sum` covers the lane's own columns until total().
template <typename T, int HEAD> struct SoftmaxRows {
    float acc[HEAD / 8][4];  // sum over keys of weight * V
    float top[2];            // largest raw (or capped) score so far, minus infinity before any
    float sum[2];            // sum of weights

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++)
            for (int i = 0; i < 4; i++) acc[n][i] = 0;
        for (int half = 0; half < 2; half++) top[half] = -infinity_float(), sum[half] = 0;
    }

    // Take in tile_keys keys, the first of which is key `first` of the cache.
    template <int tile_keys>
    __device__ __forceinline__ void add(
        const Queries<T, HEAD> &queries,
        const T *sK,                   // [tile_keys, HEAD + 8]
        const T *sV,                   // [tile_keys, HEAD + 8]
        const KeyRange (&visible)[2],  // of rows group, group + 8
        bool needs_mask, int first, const Logits &logits) {
        float scores[tile_keys / 8][4];
#pragma unroll
        for (int n = 0; n < tile_keys / 8; n++)
            for (int i = 0; i < 4; i++) scores[n][i] = 0;

#pragma unroll
        for (int k = 0; k < HEAD / 16; k++) {
            uint32 a[4];
            queries.get(a, k);
#pragma unroll
            for (int n = 0; n < tile_keys / 16; n++) {
                uint32 r[4];
                load_column_major<T, HEAD>(r, sK, 16 * n, 16 * k);
                mma_16x8x16<T>(scores[2 * n], a, {r[0], r[1]});
                mma_16x8x16<T>(scores[2 * n + 1], a, {r[2], r[3]});
            }
        }

        if (logits.cap > 0) {
#pragma unroll
            for (int n = 0; n < tile_keys / 8; n++)
                for (int i = 0; i < 4; i++) scores[n][i] = logits.capped(scores[n][i]);
        }
        if (needs_mask) {
            int column = first + threadIdx.x % 4 * 2;
#pragma unroll
            for (int n = 0; n < tile_keys / 8; n++)
                for (int i = 0; i < 4; i++) {
                    int key = column + 8 * n + i % 2;
                    if (key < visible[i / 2].begin || key >= visible[i / 2].end) scores[n][i] = -infinity_float();
                }
        }

#pragma unroll
        for (int half = 0; half < 2; half++) {
            float highest = top[half];
#pragma unroll
            for (int n = 0; n < tile_keys / 8; n++)
                highest = fmaxf(highest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
            // A row that has seen no key yet keeps minus infinity; zero in its place gives weights of 0, not NaN.
            float offset = highest == -infinity_float() ? 0 : highest * logits.multiplier;
            float shrink = exp2_fast(fmaf(top[half], logits.multiplier, -offset));
            top[half] = highest;
            sum[half] *= shrink;
#pragma unroll
            for (int n = 0; n < HEAD / 8; n++) acc[n][2 * half] *= shrink, acc[n][2 * half + 1] *= shrink;
#pragma unroll
            for (int n = 0; n < tile_keys / 8; n++)
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    scores[n][e] = exp2_fast(fmaf(scores[n][e], logits.multiplier, -offset));
                    sum[half] += scores[n][e];
                }
        }

#pragma unroll
        for (int k = 0; k < tile_keys / 16; k++) {
            const uint32 a[4] = {
                pack_weights<T>(scores[2 * k][0], scores[2 * k][1]),
                pack_weights<T>(scores[2 * k][2], scores[2 * k][3]),
                pack_weights<T>(scores[2 * k + 1][0], scores[2 * k + 1][1]),
                pack_weights<T>(scores[2 * k + 1][2], scores[2 * k + 1][3]),
            };
#pragma unroll
            for (int n = 0; n < HEAD / 16; n++) {
                uint32 r[4];
                load_row_major<true, T, HEAD>(r, sV, 16 * k, 16 * n);
                mma_16x8x16<T>(acc[2 * n], a, {r[0], r[1]});
                mma_16x8x16<T>(acc[2 * n + 1], a, {r[2], r[3]});
            }
        }
    }

    // Sum of the row's weights over all its columns.
    __device__ __forceinline__ float total(int half) const {
        float s = sum[half];
        s += __shfl_xor_sync(0xffffffffu, s, 1);
        return s + __shfl_xor_sync(0xffffffffu, s, 2);
    }
};

// What divides the accumulator: a row without keys gives zeros, a NaN among its scores stays NaN.
__device__ __forceinline__ float inverse_sum(float sum) { return sum == 0 ? 0 : 1 / sum; }

// The same once the row's sink has joined, a logit without a value: `top` and `sink` are exponents of two, minus infinity where
// there is none (and then not a bit changes).
__device__ __forceinline__ float inverse_sum_with_sink(float sum, float top, float sink) {
    float highest = fmaxf(top, sink), offset = highest == -infinity_float() ? 0 : highest;
    float shrink = exp2_fast(top - offset);
    return inverse_sum(fmaf(sum, shrink, exp2_fast(sink - offset))) * shrink;
}

// The sink of head h as an exponent of two.
__device__ __forceinline__ float sink_exponent(const float *sinks, int h) {
    return sinks ? sinks[h] * 1.4426950408889634f : -infinity_float();
}
