// Tiles of 16 keys and values for attention_decode: copied into shared memory as a cache holds them, codes decoded on the way
// to the tensor cores, and multiplied with 16 rows of queries, or of weights.
//
// Codes are copied as they are, and meet the tensor cores as float16. A product with all of a row's values may take them in any
// order: lane t of four takes values 16 t .. 16 t + 15 of each 64 of a key, and q lies in shared memory as that wants it. Of
// values, lane group g of eight takes columns 8 g .. 8 g + 7 of each 64, of two keys at a time. q4 and q8 hold H x of 64
// values: q . x = (H q / 32) . (H x), so q is transformed, once, and for V the sum is, in fp32. e4m3's scale of a key
// multiplies its score.
#pragma once
#include "attention.cuh"

constexpr int tile_keys = 16;

// --- tiles of keys or values in shared memory ---

template <CacheKind kind> constexpr bool is_transformed = kind == q4 || kind == q8;
template <CacheKind kind, typename T> struct MathType {
    using type = half;
};  // what the tensor cores multiply
template <typename T> struct MathType<dense, T> {
    using type = T;
};

// A tile is tile_keys rows, then as many rows of scales. Rows of values are padded, so that ldmatrix meets no bank conflict; of
// codes, pieces of 32 bytes change places.
template <CacheKind kind, int HEAD> struct TileLayout {
    static constexpr int row_bytes = kind == dense ? 2 * (HEAD + 8) : kind == q4 ? HEAD / 2 : HEAD;
    static constexpr int scale_words = is_transformed<kind> ? HEAD / 64 : kind == e4m3;  // 32-bit words a row
    static constexpr int scales_at = tile_keys * row_bytes, bytes = scales_at + tile_keys * 4 * scale_words;
    static_assert(kind == dense || HEAD % 64 == 0, "lanes take codes of 64 values together");

    // Where byte `at` of a row of codes lies: rows r .. r + 3, and every other row of 8, put a piece into different banks.
    static __device__ __forceinline__ int place(int row, int at) {
        if constexpr (row_bytes % 128 == 0) at ^= ((row ^ row >> 2) & 1) * 64 | (row >> 1 & 1) * 32;
        if constexpr (row_bytes % 128 == 64) at ^= (row >> 1 & 1) * 32;
        return row * row_bytes + at;
    }
};

// Rows of one tile to be copied: row r of the tile is row first + r * step of the arrays, for from <= r < to. Those with
// low <= r < high are read, the others become zeros: whatever an unused cache slot holds, NaN included, stays out of the product
// of a zero weight and V.
struct RowRun {
    int64 first;
    int step, from, to, low, high;
};

template <CacheKind kind, int HEAD>
__device__ __forceinline__ void load_rows(
    uint8 *tile,
    const uint8 *rows,   // [slots * kv_heads, row bytes]
    const half *scales,  // [slots * kv_heads, head_dim / 32], e4m3: [slots * kv_heads]
    const RowRun &run, int head_dim, int64 all_rows) {
    using Layout = TileLayout<kind, HEAD>;
    int lane = threadIdx.x % 32;
    constexpr int row_chunks = kind == dense ? HEAD / 8 : Layout::row_bytes / 16;  // of 16 bytes
    constexpr int step = row_chunks <= 32 ? 32 / row_chunks : 0;  // rows at a time: a lane keeps its column
    static_assert(step > 0, "a row has more pieces than there are lanes");
    int own_row = lane / row_chunks, chunk = lane % row_chunks;
    int bytes = kind == dense ? 2 * head_dim : Layout::row_bytes;
    bool has_column = (32 % row_chunks == 0 || own_row < step) && (kind != dense || 16 * chunk < bytes);
    const uint8 *source = rows + (run.first + (int64)own_row * run.step) * bytes + 16 * chunk;
    int64 stride = (int64)(step * run.step) * bytes;
    auto place_of = [&](int r) {
        return tile + (kind == dense ? r * Layout::row_bytes + 16 * chunk : Layout::place(r, 16 * chunk));
    };
    bool is_whole = run.from == 0 && run.to == tile_keys && run.low <= 0 && run.high >= tile_keys;
    constexpr int turns = (tile_keys + step - 1) / step;
    if (is_whole && tile_keys % step == 0 && 32 % row_chunks == 0 && (kind != dense || head_dim == HEAD)) {
        // Most tiles are: nothing is to be asked for each copy.
#pragma unroll
        for (int turn = 0; turn < turns; turn++, source += stride)
            copy_async_16(place_of(own_row + turn * step), source);
    } else {
#pragma unroll 1
        for (int turn = 0; turn < turns; turn++, source += stride) {
            int r = own_row + turn * step;
            if (r < run.from || r >= run.to || (32 % row_chunks != 0 && own_row >= step)) continue;
            copy_async_16(place_of(r), source, r >= run.low && r < run.high && has_column);
        }
    }
    if constexpr (Layout::scale_words > 0) {
#pragma unroll
        for (int i = lane; i < tile_keys * Layout::scale_words; i += 32) {
            int r = i / Layout::scale_words, word = i % Layout::scale_words;
            if (r < run.from || r >= run.to) continue;
            int64 row = run.first + (int64)r * run.step;
            int64 first = kind == e4m3 ? row & ~1 : row * (2 * Layout::scale_words) + 2 * word;
            // An e4m3 scale comes with its neighbour, if there is one.
            bool has_neighbour = kind != e4m3 || first + 1 < all_rows;
            copy_async_4(
                tile + Layout::scales_at + 4 * i, scales + first,
                r < run.low || r >= run.high ? 0
                : has_neighbour              ? 4
                                             : 2);
        }
    }
}

// --- codes to pairs of float16, without their scales ---

// Of q4, pair i is nibbles i of both halves of the word; of the others, bytes 2 i and 2 i + 1. e4m3 comes as 2^-8 of its value.
template <CacheKind kind> constexpr int word_pairs = kind == q4 ? 4 : 2;
template <CacheKind kind>
__device__ __forceinline__ void decode_word(uint32 word, uint32 (&pairs)[word_pairs<kind>]) {
    if constexpr (kind == q4) {
        constexpr uint32 magic = pair_1024, sixteenth = pair_of_power(-4);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32 shifted = word >> 8 * i;
            pairs[2 * i] = sub_half2(and_or(shifted, 0x000f000fu, magic), magic + 0x00080008u);         // 1024 + 8
            pairs[2 * i + 1] = fma_half2(and_or(shifted, 0x00f000f0u, magic), sixteenth, 0xd480d480u);  // -(64 + 8)
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if constexpr (kind == q8) {
                uint32 raised = __byte_perm(word, pair_1024 >> 8, i ? 0x4342 : 0x4140);  // 1024 + code
                pairs[i] = sub_half2(raised, pair_1024 + 0x00800080u);
            } else {
                pairs[i] = __byte_perm(word, 0, i ? 0x3424 : 0x1404);
                if constexpr (kind == e4m3) pairs[i] = and_or(pairs[i] >> 1, 0x3f803f80u, pairs[i] & 0x80008000u);
            }
        }
    }
}

// Where q's values lie for a product with codes: column 16 k + 8 h + 2 t + e of q in shared memory, which mma's fragments
// take at lane t, is this value of the head.
template <CacheKind kind> __device__ __forceinline__ int column_of_value(int value) {
    int t = value / 16 % 4, i = value % 16, k, h, e;
    if (kind == q4)
        k = i / 8 * 2 + i % 4 / 2, h = i % 2, e = i / 4 % 2;
    else
        k = i / 4, h = i / 2 % 2, e = i % 2;
    return value / 64 * 64 + 16 * k + 8 * h + 2 * t + e;
}

// The 32-point Sylvester-Hadamard transforms of the even and of the odd values of 64, of which 8 neighbouring lanes hold 8 in a
// row each. All lanes of a warp must call together.
__device__ __forceinline__ void hadamard_floats(float (&x)[8]) {
#pragma unroll
    for (int stride = 2; stride < 8; stride *= 2)
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (!(i & stride)) {
                float low = x[i], high = x[i + stride];
                x[i] = low + high, x[i + stride] = low - high;
            }
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) {
        float sign = threadIdx.x & lanes ? -1 : 1;
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = fmaf(sign, x[i], __shfl_xor_sync(0xffffffffu, x[i], lanes));
    }
}

// --- products of 16 rows with a tile ---

// Which half of its word the e4m3 scale of a tile's row is in.
struct ScaleHalves {
    int first, step;  // of row 0; whether rows alternate
    __device__ __forceinline__ int of(int row) const { return first ^ (row & step); }
};

template <CacheKind kind, typename T, int HEAD>
__device__ __forceinline__ void score_tile(
    float (&scores)[2][4], const Queries<typename MathType<kind, T>::type, HEAD> &queries, const uint8 *tile,
    ScaleHalves halves) {
    using M = typename MathType<kind, T>::type;
    using Layout = TileLayout<kind, HEAD>;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float odd[2][4];  // of odd k: two chains of products are shorter than one
#pragma unroll
    for (int n = 0; n < 2; n++)
        for (int i = 0; i < 4; i++) scores[n][i] = odd[n][i] = 0;
    if constexpr (kind == dense) {
#pragma unroll
        for (int k = 0; k < HEAD / 16; k++) {
            uint32 a[4], r[4];
            queries.get(a, k);
            load_column_major<M, HEAD>(r, (const M *)tile, 0, 16 * k);
            mma_16x8x16<M>(k % 2 ? odd[0] : scores[0], a, {r[0], r[1]});
            mma_16x8x16<M>(k % 2 ? odd[1] : scores[1], a, {r[2], r[3]});
        }
    } else {
        constexpr int words = kind == q4 ? 2 : 4;
#pragma unroll
        for (int unit = 0; unit < HEAD / 64; unit++) {
            uint32 pairs[2][8];
#pragma unroll
            for (int n = 0; n < 2; n++) {
                int row = 8 * n + g;
                auto codes = *(const Vector<uint32, words> *)(tile + Layout::place(row, 4 * words * (4 * unit + t)));
#pragma unroll
                for (int w = 0; w < words; w++) {
                    uint32 of_word[word_pairs<kind>];
                    decode_word<kind>(codes[w], of_word);
#pragma unroll
                    for (int i = 0; i < word_pairs<kind>; i++) pairs[n][w * word_pairs<kind> + i] = of_word[i];
                }
                if constexpr (is_transformed<kind>) {
                    auto scales = (const half *)(tile + Layout::scales_at) + row * (HEAD / 32);
                    uint32 scale = scales[2 * unit + t / 2].bits * 0x10001u;
#pragma unroll
                    for (int i = 0; i < 8; i++) pairs[n][i] = mul_half2(pairs[n][i], scale);
                }
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                uint32 a[4];
                queries.get(a, 4 * unit + k);
#pragma unroll
                for (int n = 0; n < 2; n++)
                    mma_16x8x16<M>(k % 2 ? odd[n] : scores[n], a, {pairs[n][2 * k], pairs[n][2 * k + 1]});
            }
        }
    }
#pragma unroll
    for (int n = 0; n < 2; n++)
        for (int i = 0; i < 4; i++) {
            scores[n][i] += odd[n][i];
            if constexpr (kind == e4m3) {
                int row = 8 * n + 2 * t + i % 2;  // the key of this score
                auto scales = (const half *)(tile + Layout::scales_at) + 2 * row;
                scores[n][i] *= 256 * to_float(scales[halves.of(row)]);
            }
        }
}

template <CacheKind kind, typename T, int HEAD>
__device__ __forceinline__ void add_values(
    float (&acc)[HEAD / 8][4], const float (&weights)[2][4], const uint8 *tile, ScaleHalves halves) {
    using M = typename MathType<kind, T>::type;
    using Layout = TileLayout<kind, HEAD>;
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32 a[4] = {
        pack_weights<M>(weights[0][0], weights[0][1]),
        pack_weights<M>(weights[0][2], weights[0][3]),
        pack_weights<M>(weights[1][0], weights[1][1]),
        pack_weights<M>(weights[1][2], weights[1][3]),
    };
    if constexpr (kind == dense) {
#pragma unroll
        for (int n = 0; n < HEAD / 16; n++) {
            uint32 r[4];
            load_row_major<true, M, HEAD>(r, (const M *)tile, 0, 16 * n);
            mma_16x8x16<M>(acc[2 * n], a, {r[0], r[1]});
            mma_16x8x16<M>(acc[2 * n + 1], a, {r[2], r[3]});
        }
    } else {
        constexpr int words = kind == q4 ? 1 : 2;  // of 8 columns of a key
        using Codes = Vector<uint32, words>;
#pragma unroll
        for (int unit = 0; unit < HEAD / 64; unit++) {
            uint32 pairs[2][8];  // keys 2 t, 2 t + 1 and those 8 further on; columns
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int row = 8 * h + 2 * t;
                auto low = *(const Codes *)(tile + Layout::place(row, 4 * words * (8 * unit + g)));
                auto high = *(const Codes *)(tile + Layout::place(row + 1, 4 * words * (8 * unit + g)));
#pragma unroll
                for (int w = 0; w < 2; w++) {  // four columns of both keys
                    uint32 of_word[word_pairs<kind>], both;
                    if constexpr (kind == q4) {
                        both = __byte_perm(low[0], high[0], w ? 0x7632 : 0x5410);
                        decode_word<kind>(both, of_word);
#pragma unroll
                        for (int i = 0; i < 4; i++) pairs[h][4 * w + i] = of_word[i];
                    } else {
#pragma unroll
                        for (int s = 0; s < 2; s++) {
                            both = __byte_perm(low[w], high[w], s ? 0x7362 : 0x5140);
                            decode_word<kind>(both, of_word);
                            pairs[h][4 * w + 2 * s] = of_word[0], pairs[h][4 * w + 2 * s + 1] = of_word[1];
                        }
                    }
                }
                if constexpr (kind != fp8) {
                    auto scales = (const half *)(tile + Layout::scales_at);
                    uint32 both;
                    if constexpr (kind == e4m3) {
                        both = scales[2 * row + halves.of(row)].bits | scales[2 * row + 2 + halves.of(row + 1)].bits
                                                                           << 16;
                        both = mul_half2(both, pair_of_power(8));
                    } else {
                        scales += row * (HEAD / 32) + 2 * unit + g / 4;
                        both = scales[0].bits | scales[HEAD / 32].bits << 16;
                    }
#pragma unroll
                    for (int i = 0; i < 8; i++) pairs[h][i] = mul_half2(pairs[h][i], both);
                }
            }
#pragma unroll
            for (int i = 0; i < 8; i++) mma_16x8x16<M>(acc[8 * unit + i], a, {pairs[0][i], pairs[1][i]});
        }
    }
}
