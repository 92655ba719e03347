// Caches of codes for attention_wgmma: codes come into shared memory as they are stored, and warps that do nothing else turn
// them into the swizzled tiles of float16 that the tensor cores read.
//
// A lane takes 8 codes in a row and writes 16 bytes: eight lanes write the 128 bytes of a row's block, so that neither reads nor
// writes meet a bank conflict. q4 and q8 hold H x of 64 values, and stay so: queries are transformed once, and sums of values
// once. Of q4 the values of each 8 lie in the order in which they are decoded, 0 4 1 5 2 6 3 7: so do those of the queries.
#pragma once
#include "kv_tile.cuh"
#include "wgmma.cuh"

// `bytes`, 4, 8 or 16, from global to shared memory without passing through registers; zeros, unread, where not valid.
template <int bytes>
__device__ __forceinline__ void copy_async_or_zero(uint32 shared, const void *global, bool is_valid) {
#if __CUDA_ARCH__ >= 800
    if constexpr (bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared),
            "l"(__cvta_generic_to_global(global)), "r"(is_valid ? 16 : 0)
            : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared),
            "l"(__cvta_generic_to_global(global)), "r"(is_valid ? bytes : 0), "n"(bytes)
            : "memory");
#endif
}

// Where a lane's row of a tile lies. What a block table says of it may still be on its way: nothing is computed from it early.
struct RowPlace {
    static constexpr uint32 unused = 0xffffffffu;
    int page, place;
    bool is_used;
    // The token's slot of the cache, as KVPages::row_of.
    __device__ __forceinline__ uint32 slot(int page_size, int pages) const {
        return is_used ? ((uint32)page < (uint32)pages ? page : 0) * (uint32)page_size + place : unused;
    }
};

// The rows of a tile of keys or values that are one warp's: `rows` of them, a multiple of 8, and at most a row a lane.
template <CacheKind kind, int HEAD, int rows> struct CodeRows {
    static constexpr int row_bytes = kind == q4 ? HEAD / 2 : HEAD, scale_bytes = is_transformed<kind> ? HEAD / 16 : 0;
    static constexpr int scales_at = rows * row_bytes, bytes = scales_at + rows * scale_bytes;
    static constexpr int chunks = HEAD / 8;       // of a row: what a lane decodes at a time
    static constexpr int at_once = 32 / chunks;   // rows of a turn of the warp
    static constexpr int turns = rows / at_once;  // in all
    static constexpr int together =
        HEAD > 128 ? 2 : 4;  // turns whose codes are read before those before them are written
    static_assert(HEAD % 64 == 0 && HEAD <= 256 && rows % 8 == 0 && rows <= 32 && turns % together == 0, "whole turns");

    // What follows from the lane is computed anew for each tile: all of it would not fit the registers, which are few.
    uint32 scale;  // e4m3: of this lane's row

    // Ask for the rows to come into `stage`; slot: of this lane's row. All lanes of the warp must call.
    __device__ __forceinline__ void load(
        uint32 stage,
        const uint8 *codes,  // [slots, kv_heads, row_bytes]
        const half *scales,  // [slots, kv_heads, HEAD / 32], e4m3: [slots, kv_heads]
        uint32 slot, int kv_head, int kv_heads) {
        constexpr int pieces = row_bytes / 16, step = 32 / pieces;
        int lane = kept(threadIdx.x % 32);
        const uint8 *source = codes + kv_head * row_bytes + lane % pieces * 16;
        uint32 stride = kv_heads * row_bytes;
#pragma unroll
        for (int turn = 0; turn < rows / step; turn++) {
            uint32 from = __shfl_sync(0xffffffffu, slot, turn * step + lane / pieces);
            bool is_used = from != RowPlace::unused;
            copy_async_or_zero<16>(
                stage + lane * 16 + turn * 512, source + (uint64)(is_used ? from : 0) * stride, is_used);
        }
        if constexpr (kind != fp8) {
            bool is_used = slot != RowPlace::unused;
            uint64 row = (uint64)(is_used ? slot : 0) * kv_heads + kv_head;
            if constexpr (kind == e4m3)
                scale = is_used ? scales[row].bits : 0;
            else if (lane < rows)
                copy_async_or_zero<scale_bytes>(
                    stage + scales_at + lane * scale_bytes, scales + row * (HEAD / 32), is_used);
        }
    }

    // Decode them into a tile at these rows, with blocks of 64 columns block_bytes apart: as wgmma_descriptor says.
    __device__ __forceinline__ void decode(uint32 stage, uint32 tile, uint32 block_bytes) const {
        constexpr int words = cache_code_words<kind>;
        int lane = kept(threadIdx.x % 32), chunk = lane % chunks, row = lane / chunks;
        uint32 from = stage + lane * (4 * words), scales_from = stage + scales_at + lane / 4 * 2;
        uint32 to = tile + chunk / 8 * block_bytes + row * 128 + (chunk % 8 ^ row) * 16;
        uint32 factor = kind == e4m3 ? mul_half2(scale * 0x10001u, pair_of_power(8)) : 0;
        uint32 codes[2][together][words], factors[2][together];
        auto fetch = [&](int first) {
#pragma unroll
            for (int i = 0; i < together; i++) {
                int turn = first + i, half = first / together % 2;
                if constexpr (words == 1) {
                    codes[half][i][0] = load_shared_4(from + turn * 128);
                } else {
                    uint2 two = load_shared_8(from + turn * 256);
                    codes[half][i][0] = two.x, codes[half][i][words - 1] = two.y;
                }
                if constexpr (is_transformed<kind>) factors[half][i] = load_shared_2(scales_from + turn * 16);
            }
        };
        fetch(0);
#pragma unroll
        for (int first = 0; first < turns; first += together) {
            if (first + together < turns) fetch(first + together);
#pragma unroll
            for (int i = 0; i < together; i++) {
                int turn = first + i, half = first / together % 2;
                uint32 pairs[4];
#pragma unroll
                for (int w = 0; w < words; w++) {
                    uint32 of_word[word_pairs<kind>];
                    decode_word<kind>(codes[half][i][w], of_word);
#pragma unroll
                    for (int p = 0; p < word_pairs<kind>; p++) pairs[w * word_pairs<kind> + p] = of_word[p];
                }
                if constexpr (kind != fp8) {
                    uint32 both = kind == e4m3 ? __shfl_sync(0xffffffffu, factor, turn * at_once + row)
                                               : both_low(factors[half][i]);
#pragma unroll
                    for (int p = 0; p < 4; p++) pairs[p] = mul_half2(pairs[p], both);
                }
                int first_row = turn * at_once;  // whose place in the swizzle's pattern joins the lane's own
                store_shared_16(
                    (to ^ first_row % 8 * 16) + first_row * 128, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
            }
        }
    }
};

// Of a tile as it is stored; four warps have a quarter each.
template <CacheKind kind, int HEAD, int tile_keys>
constexpr int code_tile_bytes = 4 * CodeRows<kind, HEAD, tile_keys / 4>::bytes;

struct CodeCaches {
    const uint8 *k;
    const half *k_scales;
    const uint8 *v;
    const half *v_scales;
    int kv_heads, page_size, pages;
};

// Where in the ring one is, and the parity of the barriers there.
template <int stages> struct RingCursor {
    int slot = 0;
    uint32 parity = 0;
    __device__ __forceinline__ void advance() {
        if (++slot == stages) slot = 0, parity ^= 1;
    }
};

// A tile of keys and one of values that are to be decoded.
struct CodeTile {
    RowPlace place;  // of this lane's row
    int kv_head;
    bool is_found, begins_item;
};

// What each of four warps does that make tiles: a quarter of the rows of every tile of keys, and of the values of the same
// tokens. find_tile() says which is the next; note_queries() notes the queries of its item, and load_queries() asks for those
// that were noted. Codes are asked for a tile ahead.
template <
    CacheKind k_kind, CacheKind v_kind, int HEAD, int tile_keys, int stages, typename FindTile, typename NoteQueries,
    typename LoadQueries>
__device__ __forceinline__ void decode_tiles(
    const CodeCaches &caches,
    uint32 codes_at,           // a tile of keys, then one of values, as stored
    uint32 k_at, uint32 v_at,  // rings of decoded tiles
    uint32 k_full,
    uint32 v_full,  // barriers, one for each place in a ring, followed by those that say that it is empty
    FindTile find_tile, NoteQueries note_queries, LoadQueries load_queries) {
    constexpr int rows = tile_keys / 4, block_bytes = tile_keys * 128, tile_bytes = HEAD / 64 * block_bytes;
    int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
    CodeRows<k_kind, HEAD, rows> keys;
    CodeRows<v_kind, HEAD, rows> values;
    uint32 k_stage = codes_at + warp * keys.bytes;
    uint32 v_stage = codes_at + code_tile_bytes<k_kind, HEAD, tile_keys> + warp * values.bytes;
    CodeTile next = find_tile();
    uint32 slot = 0;
    auto load_keys = [&] {
        slot = next.place.slot(caches.page_size, caches.pages);
        if (next.is_found) keys.load(k_stage, caches.k, caches.k_scales, slot, next.kv_head, caches.kv_heads);
        copy_async_commit();
    };
    auto load_values = [&] {
        if (next.is_found) values.load(v_stage, caches.v, caches.v_scales, slot, next.kv_head, caches.kv_heads);
        copy_async_commit();
    };
    // Until the codes have arrived for all lanes, and the place that they go to is free.
    RingCursor<stages> cursor;
    auto wait = [&](uint32 full) {
        copy_async_wait<1>();
        barrier_wait(full + 8 * (stages + cursor.slot), cursor.parity ^ 1);
        __syncwarp();
    };
    auto arrive = [&](uint32 full) {
        fence_bulk_shared();
        __syncwarp();
        if (lane == 0) barrier_arrive(full + 8 * cursor.slot);
    };
    load_keys();
    load_values();
    note_queries();
    if (next.is_found) load_queries();
    bool begins_item = false;  // whose queries are not on their way yet
    while (next.is_found) {
        next = find_tile();
        uint32 own_at = cursor.slot * tile_bytes + warp * rows * 128;
        wait(k_full);
        keys.decode(k_stage, k_at + own_at, block_bytes);
        arrive(k_full);
        if (begins_item) load_queries();
        load_keys();
        wait(v_full);
        values.decode(v_stage, v_at + own_at, block_bytes);
        arrive(v_full);
        load_values();
        cursor.advance();
        begins_item = next.begins_item;
        note_queries();
    }
}

// Queries for keys of such a cache: 16 rows of a warp, blocks of 64 columns block_bytes apart, swizzled, in place.
template <CacheKind kind, typename T, int HEAD>
__device__ __forceinline__ void prepare_queries(uint32 rows, uint32 block_bytes) {
    int lane = threadIdx.x % 32;
#pragma unroll 2
    for (int i = 0; i < HEAD / 16; i++) {
        int chunk = (i * 32 + lane) % (HEAD / 8), row = (i * 32 + lane) / (HEAD / 8);
        uint32 at = rows + chunk / 8 * block_bytes + row * 128 + (chunk % 8 ^ row % 8) * 16;
        uint4 values = load_shared_16(at);
        const uint32 pairs[4] = {values.x, values.y, values.z, values.w};
        float x[8];
#pragma unroll
        for (int p = 0; p < 4; p++)
            x[2 * p] = to_float(T{(uint16)pairs[p]}), x[2 * p + 1] = to_float(T{(uint16)(pairs[p] >> 16)});
        if constexpr (is_transformed<kind>) {
            hadamard_floats(x);
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] *= 1.0f / 32;
        }
        uint32 packed[4];
#pragma unroll
        for (int p = 0; p < 4; p++)
            packed[p] = kind == q4 ? pack_weights<half>(x[p], x[p + 4]) : pack_weights<half>(x[2 * p], x[2 * p + 1]);
        store_shared_16(at, make_uint4(packed[0], packed[1], packed[2], packed[3]));
    }
}

// Sums of transformed values, as wgmma leaves them, to those of the values, but for a factor of 32: the transforms of the even
// and of the odd values of each 64. Column 8 n + 2 t + e of the product is value 8 n + 2 t + e, of q4 8 n + t + 4 e.
template <CacheKind kind, int size> __device__ __forceinline__ void transform_sums(float (&acc)[size]) {
    auto join = [&](int i, int j) {
        float low = acc[i], high = acc[j];
        acc[i] = low + high, acc[j] = low - high;
    };
#pragma unroll
    for (int stride = 4; stride < 32; stride *= 2)  // of n
#pragma unroll
        for (int i = 0; i < size; i++)
            if (!(i & stride)) join(i, i + stride);
    if constexpr (kind == q4) {
#pragma unroll
        for (int i = 0; i < size; i += 2) join(i, i + 1);
    }
#pragma unroll
    for (int lanes = kind == q4 ? 2 : 1; lanes < 4; lanes *= 2) {
        float sign = threadIdx.x & lanes ? -1 : 1;
#pragma unroll
        for (int i = 0; i < size; i++) acc[i] = fmaf(sign, acc[i], __shfl_xor_sync(0xffffffffu, acc[i], lanes));
    }
}

// Of q4, lane t holds values t and t + 4 of 8: two lanes make pairs of neighbours of them, t, t + 1 and then those 4 further on.
__device__ __forceinline__ void join_neighbours(float &low, float &high) {
    bool is_odd = threadIdx.x & 1;
    float other = __shfl_xor_sync(0xffffffffu, is_odd ? low : high, 1);
    (is_odd ? low : high) = other;
}
