// attention_decode: out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, h / group]) * v[b, j, h / group], few queries
//
// Work split  the queries * group rows of one kv head are the rows of mma tiles (16 a block), so that K and V are read once for
//             all of them. The keys of a sequence, in tiles of 16, are cut into shares; a block computes a share for one kv
//             head. How long a share is follows from the true lengths of all sequences, on the device: about all tiles /
//             `target`, but `least_tiles` or more. So long sequences get more blocks, a launch made for longer caches computes the
//             same bits, and blocks without a share end at once. The warps of a block take turns over its tiles, each with its
//             own cp.async ring of `stages` tiles, and join through shared memory. A share that is not alone leaves (sum of
//             weight * V, top, sum of weights) per row in `parts`; the last one to arrive adds the shares in order.
//             While the kernel before this one still works, blocks ask for their first keys to come into L2.
// Codes       are copied as they are, and decoded on the way to the tensor cores, which take float16 then. A product with all
//             of a row's values may take them in any order: lane t of four takes values 16 t .. 16 t + 15 of each 64 of a key,
//             and q lies in shared memory as that wants it. Of values, lane group g of eight takes columns 8 g .. 8 g + 7 of
//             each 64, of two keys at a time. q4 and q8 hold H x of 64 values: q . x = (H q / 32) . (H x), so q is transformed,
//             once, and for V the sum is, in fp32. e4m3's scale of a key multiplies its score.
// Numerics    as attention_prefill; the joins of warps and shares are fp32 in a fixed order: same bits every run.
// Limits      head_dim a multiple of 8, HEAD that rounded up to 16, at most 256; codes: a multiple of 64, pages of 2 tokens or
//             more. 16-byte aligned arrays; any number of queries, capacity and batch. out may be q.
// Traffic     visible keys * kv_heads * 2 rows (of values, or of codes and scales) for every 16 rows of q; parts: 4 * rows *
//             shares * (head_dim + 2) bytes, written and read.
// Reference   cupyq/ops/attention.py: attention_reference. Method: Flash-Decoding (pytorch.org/blog/flash-decoding).
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
    constexpr int together =
        HEAD > 128 ? 4 : 16;  // copies whose addresses are at hand: wide heads have no registers for more
#pragma unroll together
    for (int turn = 0; turn < (tile_keys + step - 1) / step; turn++, source += stride) {
        int r = own_row + turn * step;
        if (r < run.from || r >= run.to || (32 % row_chunks != 0 && own_row >= step)) continue;
        int place = kind == dense ? r * Layout::row_bytes + 16 * chunk : Layout::place(r, 16 * chunk);
        copy_async_16(tile + place, source, r >= run.low && r < run.high && has_column);
    }
    if constexpr (Layout::scale_words > 0) {
#pragma unroll
        for (int i = lane; i < tile_keys * Layout::scale_words; i += 32) {
            int r = i / Layout::scale_words, word = i % Layout::scale_words;
            if (r < run.from || r >= run.to) continue;
            int64 row = run.first + (int64)r * run.step;
            int64 first = kind == e4m3 ? row & ~1 : row * (2 * Layout::scale_words) + 2 * word;
            bool is_whole =
                kind != e4m3 || first + 1 < all_rows;  // an e4m3 scale comes with its neighbour, if there is one
            copy_async_4(
                tile + Layout::scales_at + 4 * i, scales + first,
                r < run.low || r >= run.high ? 0
                : is_whole                   ? 4
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
    for (int lanes = 1; lanes < 8; lanes *= 2)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float other = __shfl_xor_sync(0xffffffffu, x[i], lanes);
            x[i] = threadIdx.x & lanes ? other - x[i] : x[i] + other;
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

// --- who computes what ---

// The queries and keys of one sequence.
struct Sequence {
    int first_row, queries;  // rows of q, over its heads
    int length;              // valid keys
    int begin, end;          // keys that some query sees; tiles start at multiples of tile_keys
    int tiles, row_tiles;
};

// What a block is to do.
struct Share {
    int b, kv_head, row_tile, split, splits;  // split of splits
    int item;                                 // among the row tiles and heads that are split
    int64 part;                               // the first of the item's parts
    Sequence sequence;
};

__device__ __forceinline__ int64 sum_of_lanes(int64 x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

template <typename T, int HEAD, CacheKind k_kind, CacheKind v_kind, int warps, int stages>
__global__ void __launch_bounds__(32 * warps, warps > 4 || HEAD > 128 ? 1 : 2) attention_decode(
    const T *q,             // [batch, most_queries, heads, head_dim]; with query_starts [most_queries, heads, head_dim]
    const uint8 *k,         // [pages, page size, kv_heads, head_dim] of T, or codes
    const half *k_scales,   // of codes
    const uint8 *v,         // as k
    const half *v_scales,   // as k_scales
    const int *kv_lengths,  // [batch] or null: all of capacity
    const int *block_table,   // [batch, max_pages] or null: page b is sequence b, its size the capacity
    const int *query_starts,  // [batch + 1] or null
    const float *sinks,       // [heads] or null
    T *out,                   // as q
    float
        *parts,  // for each share that is not alone: [part_rows, head_dim], then [part_rows, 2]: top, sum; padded to 4
    uint32 *
        arrived,  // a counter per row tile and head that is split: zero before and after; null, as parts, for no splits
    int batch, int most_queries, int heads, int kv_heads, int head_dim, int capacity, int page_shift, int max_pages,
    int pages, int is_causal, int window, float scale, float softcap,  // softcap 0: none
    int target,         // shares of all sequences, about; 0: none is split
    int least_tiles,    // of a share
    int part_rows,      // 16, or less where no row tile has so many
    int ahead_tiles) {  // tiles of a warp that come into L2 while the kernel before still works
    using KLayout = TileLayout<k_kind, HEAD>;
    using VLayout = TileLayout<v_kind, HEAD>;
    using M = typename MathType<k_kind, T>::type;
    constexpr int row_values = HEAD + 8, threads = 32 * warps, stage_bytes = KLayout::bytes + VLayout::bytes;
    constexpr int part_floats = 16 * row_values + 32;  // of one warp: acc, top, sum; laid over its ring at the end
    constexpr int warp_bytes = stages * stage_bytes > 4 * part_floats ? stages * stage_bytes : 4 * part_floats;
    constexpr int room = warps * warp_bytes / 64 - row_values;
    constexpr int most_splits = room < 256 ? room : 256;  // whose weights for 16 rows fit beside a result
    static_assert(stage_bytes % 16 == 0 && most_splits >= 16, "the ring's stages begin at multiples of 16 bytes");

    let_next_kernel_start();
    if constexpr (!on_tensor_cores<M> || !on_tensor_cores<typename MathType<v_kind, T>::type>) return __trap();

    extern __shared__ __align__(16) uint8 shared[];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint8 *ring = shared + warp * warp_bytes;    // [stages, K and V]
    M *sQ = (M *)(shared + warps * warp_bytes);  // [16, row_values]

    int group = heads / kv_heads;
    KVPages cache = {block_table, capacity, page_shift, max_pages, pages};
    Logits logits(scale, softcap);

    // Tables are read past L1, as some are read before the kernel that may write them has ended, and then again.
    auto sequence_of = [&](int b) {
        Sequence s = {};
        if (b >= batch) return s;
        s.first_row = b * most_queries, s.queries = most_queries;
        if (query_starts) {  // whatever the table says, rows stay inside of q
            s.first_row = min(max(__ldcg(query_starts + b), 0), most_queries);
            s.queries = min(max(__ldcg(query_starts + b + 1), s.first_row), most_queries) - s.first_row;
        }
        s.length = kv_lengths ? min(max(__ldcg(kv_lengths + b), 0), capacity) : capacity;
        s.row_tiles = (s.queries * group + 15) / 16;
        s.begin = min(visible_keys(0, s.queries, s.length, is_causal, window).begin, s.length), s.end = s.length;
        s.tiles = (s.end + tile_keys - 1) / tile_keys - s.begin / tile_keys;
        return s;
    };

    // Share `index` of all shares. All warps do this alike, a sequence per lane.
    auto find_share = [&](int64 index, Share &share) {
        share.item = share.part = 0;
        if (target == 0) {
            int row_tiles = (most_queries * group + 15) / 16;
            share.kv_head = index % kv_heads, share.row_tile = index / kv_heads % row_tiles;
            share.b = index / kv_heads / row_tiles, share.split = 0, share.splits = 1;
            share.sequence = sequence_of(share.b);
            return share.b < batch;
        }
        bool is_single = batch == 1;  // then nothing is to be exchanged between lanes
        Sequence own = sequence_of(is_single ? 0 : lane);
        int64 work = (int64)own.tiles * own.row_tiles;
        if (!is_single) {
            for (int b = lane + 32; b < batch; b += 32) {
                Sequence s = sequence_of(b);
                work += (int64)s.tiles * s.row_tiles;
            }
            work = sum_of_lanes(work);
        }
        // Tiles of a share. Where there are few, no more than half as many shares: all of them then run at once.
        work *= kv_heads;
        int even = (int)((work + target - 1) / target), at_once = (int)((2 * work + target - 1) / target);
        int longest = max(max(least_tiles, even), min(2 * least_tiles, at_once));
        auto splits_of = [&](int tiles) { return max(1, min((tiles + longest - 1) / longest, most_splits)); };

        for (int base = 0; base < batch; base += 32) {
            if (base > 0) own = sequence_of(base + lane);
            int splits = splits_of(own.tiles), items = own.row_tiles * kv_heads, shares = splits * items, sum = shares;
            int owner = 0;
            if (!is_single) {
                for (int step = 1; step < 32; step *= 2) {
                    int others = __shfl_up_sync(0xffffffffu, sum, step);
                    if (lane >= step) sum += others;
                }
                uint32 reached = __ballot_sync(0xffffffffu, index < sum);
                bool is_before = !reached || lane < __ffs(reached) - 1, is_split = splits > 1;
                share.item += (int)sum_of_lanes(is_before && is_split ? items : 0);
                share.part += sum_of_lanes(is_before && is_split ? shares : 0);
                if (!reached) {
                    index -= __shfl_sync(0xffffffffu, sum, 31);
                    continue;
                }
                owner = __ffs(reached) - 1;
                index -= __shfl_sync(0xffffffffu, sum - shares, owner);
                splits = __shfl_sync(0xffffffffu, splits, owner);
                share.sequence = sequence_of(base + owner);
            } else {
                if (index >= shares) return false;
                share.sequence = own;
            }
            int place = (int)index;  // neighbouring blocks read neighbouring heads of the same keys
            share.b = base + owner, share.splits = splits;
            share.kv_head = place % kv_heads, share.split = place / kv_heads % splits;
            share.row_tile = place / kv_heads / splits;
            int item = share.row_tile * kv_heads + share.kv_head;
            share.item += item, share.part += (int64)item * splits;
            return true;
        }
        return false;
    };

    // The share's tiles of keys, counted from key 0, and this warp's: every warps-th from `first` on.
    struct Tiles {
        int first, count;
    };
    auto tiles_of = [&](const Share &share) {
        int shorter = share.sequence.tiles / share.splits, longer = share.sequence.tiles % share.splits;
        int first = share.sequence.begin / tile_keys + share.split * shorter + min(share.split, longer) + warp;
        int own = shorter + (share.split < longer) - warp;
        return Tiles{first, own > 0 ? (own + warps - 1) / warps : 0};
    };
    // The row of the arrays that a tile's first key is in, and how many keys from it on lie at one distance from each other.
    int run_keys = block_table ? min(1 << page_shift, tile_keys) : tile_keys;
    auto tile_row = [&](const Share &share, int tile) {
        return cache.row_of(share.b, min(tile * tile_keys, capacity - 1)) * kv_heads + share.kv_head;
    };
    int64 all_rows = (block_table ? (int64)pages << page_shift : (int64)pages * capacity) * kv_heads;

    Share share;
#if __CUDA_ARCH__ >= 900
    if (ahead_tiles > 0 && find_share(blockIdx.x, share)) {
        Tiles own = tiles_of(share);
        for (int i = 0; i < min(own.count, ahead_tiles); i++) {
            int tile = own.first + i * warps;
            int64 row = tile_row(share, tile);
            auto prefetch = [&](const uint8 *array, int row_bytes) {
                int lines = (row_bytes + 127) / 128;
                for (int j = lane; j < tile_keys * lines; j += 32)
                    if (j / lines < run_keys && tile * tile_keys + j / lines < share.sequence.end)
                        prefetch_l2(array + (row + (int64)(j / lines) * kv_heads) * row_bytes + j % lines * 128);
            };
            prefetch(k, k_kind == dense ? 2 * head_dim : KLayout::row_bytes);
            prefetch(v, v_kind == dense ? 2 * head_dim : VLayout::row_bytes);
        }
    }
#endif
    wait_for_previous_kernel();

#pragma unroll 1
    for (int64 index = blockIdx.x; find_share(index, share); index += gridDim.x) {
        const Sequence &sequence = share.sequence;
        int first_row = 16 * share.row_tile, row_count = min(16, sequence.queries * group - first_row);
        if (row_count <= 0) continue;
        // Row r is head r % group of this kv head at query r / group.
        auto head_of = [&](int r) { return share.kv_head * group + (first_row + r) % group; };
        auto query_row = [&](int r) {
            return ((int64)sequence.first_row + (first_row + r) / group) * heads + head_of(r);
        };
        if constexpr (k_kind == dense) {
            for (int chunk = threadIdx.x; chunk < 16 * HEAD / 8; chunk += threads) {
                int r = chunk / (HEAD / 8), c = chunk % (HEAD / 8) * 8;
                bool is_valid = r < row_count && c < head_dim;
                copy_async_16(sQ + r * row_values + c, q + (is_valid ? query_row(r) * head_dim + c : 0), is_valid);
            }
            copy_async_commit();
        }

        // --- this warp's tiles of the keys ---
        Tiles own = tiles_of(share);
        int64 next_row = own.count > 0 ? tile_row(share, own.first) : 0;
        auto load_keys = [&](int i) {
            int first = (own.first + i * warps) * tile_keys;
            uint8 *stage = ring + i % stages * stage_bytes;
            RowRun run = {next_row, kv_heads, 0, run_keys, sequence.begin - first, sequence.end - first};
            if (i + 1 < own.count) next_row = tile_row(share, own.first + (i + 1) * warps);  // on its way meanwhile
#pragma unroll 1
            while (true) {
                load_rows<k_kind, HEAD>(stage, k, k_scales, run, head_dim, all_rows);
                load_rows<v_kind, HEAD>(stage + KLayout::bytes, v, v_scales, run, head_dim, all_rows);
                if (run.to == tile_keys) break;
                run.from = run.to, run.to += run_keys;
                int key = min(first + run.from, capacity - 1);
                run.first = (cache.row_of(share.b, key) - run.from) * kv_heads + share.kv_head;
            }
        };
#pragma unroll 1
        for (int i = 0; i < stages; i++) {
            if (i < own.count) load_keys(i);
            copy_async_commit();
        }
        if constexpr (k_kind != dense) {  // while the first keys come
            for (int chunk = threadIdx.x; chunk < 16 * HEAD / 8; chunk += threads) {
                int r = chunk / (HEAD / 8), c = chunk % (HEAD / 8) * 8;
                float x[8];
                Vector<T, 8> values = {};
                if (r < row_count) values = *(const Vector<T, 8> *)(q + query_row(r) * head_dim + c);
                for (int i = 0; i < 8; i++) x[i] = to_float(values[i]);
                if constexpr (is_transformed<k_kind>) {
                    hadamard_floats(x);
                    for (int i = 0; i < 8; i++) x[i] *= 1.0f / 32;
                }
                for (int i = 0; i < 8; i++) sQ[r * row_values + column_of_value<k_kind>(c + i)] = from_float<M>(x[i]);
            }
        } else {
            copy_async_wait<stages>();
        }
        __syncthreads();
        Queries<M, HEAD> queries;
        queries.load(sQ);
        auto visible = [&](int r) {
            return visible_keys((first_row + r) / group, sequence.queries, sequence.length, is_causal, window);
        };
        const KeyRange row_keys[2] = {visible(lane / 4), visible(lane / 4 + 8)};
        ScaleHalves halves = {
            (int)((block_table ? 0 : (int64)share.b * capacity * kv_heads) + share.kv_head & 1), kv_heads & 1};

        float acc[HEAD / 8][4], top[2], sum[2];  // as SoftmaxRows
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++)
            for (int i = 0; i < 4; i++) acc[n][i] = 0;
        for (int half = 0; half < 2; half++) top[half] = -infinity_float(), sum[half] = 0;

#pragma unroll 1
        for (int i = 0; i < own.count; i++) {
            copy_async_wait<stages - 1>();
            __syncwarp();  // this tile has arrived for all lanes
            const uint8 *stage = ring + i % stages * stage_bytes;
            float scores[2][4];
            score_tile<k_kind, T, HEAD>(scores, queries, stage, halves);

            int column = (own.first + i * warps) * tile_keys + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < 2; n++)
                for (int e = 0; e < 4; e++) {
                    int key = column + 8 * n + e % 2;
                    if (logits.cap > 0) scores[n][e] = logits.capped(scores[n][e]);
                    if (key < row_keys[e / 2].begin || key >= row_keys[e / 2].end) scores[n][e] = -infinity_float();
                }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float highest = fmaxf(
                    fmaxf(scores[0][2 * half], scores[0][2 * half + 1]),
                    fmaxf(scores[1][2 * half], scores[1][2 * half + 1]));
                highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
                highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
                highest = fmaxf(highest, top[half]);
                // A row that has seen no key yet keeps minus infinity; zero in its place gives weights of 0, not NaN.
                float offset = highest == -infinity_float() ? 0 : highest * logits.multiplier;
                float shrink = exp2_fast(fmaf(top[half], logits.multiplier, -offset));
                top[half] = highest;
                sum[half] *= shrink;
#pragma unroll
                for (int n = 0; n < HEAD / 8; n++) acc[n][2 * half] *= shrink, acc[n][2 * half + 1] *= shrink;
#pragma unroll
                for (int n = 0; n < 2; n++)
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        scores[n][e] = exp2_fast(fmaf(scores[n][e], logits.multiplier, -offset));
                        sum[half] += scores[n][e];
                    }
            }
            add_values<v_kind, T, HEAD>(acc, scores, stage + KLayout::bytes, halves);
            __syncwarp();  // all lanes are done with the tile, whose place comes free
            if (i + stages < own.count) load_keys(i + stages);
            copy_async_commit();
        }

        // --- join the warps, in warp order ---
        copy_async_wait<0>();  // lanes are done reading the ring; the other warps have rings of their own
        float *warp_part = (float *)ring;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = lane / 4 + 8 * half;
            float total = sum[half] + __shfl_xor_sync(0xffffffffu, sum[half], 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            if (r >= row_count) continue;
            if (lane % 4 == 0) {
                warp_part[16 * row_values + r] = top[half] * logits.multiplier;
                warp_part[16 * row_values + 16 + r] = total;
            }
            float *row = warp_part + r * row_values;
#pragma unroll
            for (int n = 0; n < HEAD / 8; n++) {
                if constexpr (v_kind == dense) {
                    *(float2 *)(row + 8 * n + lane % 4 * 2) = make_float2(acc[n][2 * half], acc[n][2 * half + 1]);
                } else {  // column 8 g + n % 8 of 64 was column g of product n
                    float *first = row + n / 8 * 64 + lane % 4 * 16 + n % 8;
                    first[0] = acc[n][2 * half], first[8] = acc[n][2 * half + 1];
                }
            }
        }
        __syncthreads();

        float *result =
            (float *)shared;  // [16, row_values] before the transform of q4 and q8, over the first warp's part
        auto write = [&](int r, int column, float4 values, float factor) {
            values = make_float4(values.x * factor, values.y * factor, values.z * factor, values.w * factor);
            if constexpr (is_transformed<v_kind>) {
                *(float4 *)(result + r * row_values + column) = values;
            } else {
                uint2 packed = make_uint2(pack_pair<T>(values.x, values.y), pack_pair<T>(values.z, values.w));
                *(uint2 *)(out + query_row(r) * head_dim + column) = packed;
            }
        };
        auto write_transformed = [&] {
            if constexpr (is_transformed<v_kind>) {
                __syncthreads();
                int chunks = row_count * HEAD / 8, whole = (chunks + 31) / 32 * 32;  // a warp's lanes stay together
                for (int chunk = threadIdx.x; chunk < whole; chunk += threads) {
                    int r = chunk / (HEAD / 8), c = chunk % (HEAD / 8) * 8;
                    float x[8];
                    for (int i = 0; i < 8; i++) x[i] = chunk < chunks ? result[r * row_values + c + i] : 0;
                    hadamard_floats(x);
                    Vector<T, 8> values;
                    for (int i = 0; i < 8; i++) values[i] = from_float<T>(x[i] * (1.0f / 32));
                    if (chunk < chunks) *(Vector<T, 8> *)(out + query_row(r) * head_dim + c) = values;
                }
            }
        };

        int pieces = head_dim / 4;  // of a row
        int64 part_stride = (int64)part_rows * head_dim + (2 * part_rows + 3) / 4 * 4;
        float *own_part = parts + (share.part + share.split) * part_stride;
#pragma unroll 1
        for (int i = threadIdx.x; i < row_count * pieces; i += threads) {
            int r = i / pieces, column = i % pieces * 4;
            auto part = [&](int w) { return (const float *)(shared + w * warp_bytes); };
            float highest = -infinity_float(), total = 0;
            float4 values = make_float4(0, 0, 0, 0);
            for (int w = 0; w < warps; w++) highest = fmaxf(highest, part(w)[16 * row_values + r]);
            float offset = highest == -infinity_float() ? 0 : highest;
            for (int w = 0; w < warps; w++) {
                float weight = exp2_fast(part(w)[16 * row_values + r] - offset);
                float4 x = *(const float4 *)(part(w) + r * row_values + column);
                total += weight * part(w)[16 * row_values + 16 + r];
                values.x += weight * x.x, values.y += weight * x.y, values.z += weight * x.z, values.w += weight * x.w;
            }
            if (share.splits == 1) {
                write(r, column, values, inverse_sum_with_sink(total, highest, sink_exponent(sinks, head_of(r))));
            } else {
                *(float4 *)(own_part + r * head_dim + column) = values;
                if (column == 0) *(float2 *)(own_part + part_rows * head_dim + 2 * r) = make_float2(highest, total);
            }
        }
        if (share.splits == 1) {
            write_transformed();
            __syncthreads();  // before the next share's keys
            continue;
        }

        // --- the last share to arrive adds all of them, in order ---
        __syncthreads();
        bool *is_last = (bool *)sQ;  // the queries are used up
        if (threadIdx.x == 0) {
            __threadfence();  // what the block has written, before its arrival
            *is_last = atomicAdd(arrived + share.item, 1u) == share.splits - 1;
            if (*is_last) arrived[share.item] = 0;
            __threadfence();
        }
        __syncthreads();
        if (*is_last) {
            const float *first_part = parts + share.part * part_stride;
            float *weights = result + 16 * row_values;  // [16, splits]
            float *factors = (float *)sQ + 4;           // [16]
            constexpr int in_flight = HEAD > 128 ? 8 : 16;
            float4 x[in_flight];
            auto fetch = [&](int i, int first) {  // what some shares have for piece i of the rows
                const float *piece = first_part + i / pieces * head_dim + i % pieces * 4;
#pragma unroll
                for (int s = 0; s < in_flight; s++)
                    x[s] = __ldcg((const float4 *)(piece + min(first + s, share.splits - 1) * part_stride));
            };
            fetch(min((int)threadIdx.x, row_count * pieces - 1), 0);  // on its way while the weights are computed
            for (int r = warp; r < row_count; r += warps) {
                auto stat_of = [&](int s) {
                    if (s >= share.splits) return make_float2(-infinity_float(), 0);
                    return __ldcg((const float2 *)(first_part + s * part_stride + part_rows * head_dim + 2 * r));
                };
                float2 stat = stat_of(lane);
                float highest = stat.x, total = 0;
                for (int s = lane + 32; s < share.splits; s += 32) highest = fmaxf(highest, stat_of(s).x);
                for (int lanes = 16; lanes > 0; lanes /= 2)
                    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, lanes));
                float offset = highest == -infinity_float() ? 0 : highest;
                for (int s = lane; s < share.splits; s += 32) {
                    if (s > lane) stat = stat_of(s);
                    float weight = exp2_fast(stat.x - offset);
                    total += weight * stat.y;
                    weights[r * share.splits + s] = weight;
                }
                for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
                if (lane == 0) factors[r] = inverse_sum_with_sink(total, highest, sink_exponent(sinks, head_of(r)));
            }
            __syncthreads();
#pragma unroll 1
            for (int i = threadIdx.x; i < row_count * pieces; i += threads) {
                int r = i / pieces, column = i % pieces * 4;
                float4 values = make_float4(0, 0, 0, 0);
#pragma unroll 1
                for (int first = 0; first < share.splits; first += in_flight) {
                    if (i >= threads || first > 0) fetch(i, first);
#pragma unroll
                    for (int s = 0; s < in_flight; s++) {
                        float weight = first + s < share.splits ? weights[r * share.splits + first + s] : 0;
                        values.x += weight * x[s].x, values.y += weight * x[s].y;
                        values.z += weight * x[s].z, values.w += weight * x[s].w;
                    }
                }
                write(r, column, values, factors[r]);
            }
            write_transformed();
        }
        __syncthreads();
    }
}
