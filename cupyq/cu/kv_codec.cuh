// The codec of quantized caches (formats/kv_cache.py defines it), and where the tokens of a call lie in a cache.
//
// A quarter of a warp holds a chunk of 64 values, each lane 8 in a row, as 4 pairs (the even value in the low half):
//
//     lane of the quarter     0           1           ...  3          | 4           ...  7
//     values of the chunk     0 .. 7      8 .. 15          24 .. 31   | 32 .. 39         56 .. 63
//     pairs                   0 .. 3      4 .. 7           12 .. 15   | 16 .. 19         28 .. 31
//     scale                   0                                       | 1
//
// Both halves of a pair go through a stage at once: the transforms of the even and of the odd values. Strides 1 and 2 pair
// registers of a lane; strides 4, 8 and 16 pair lanes that differ by 1, 2 and 4. All 32 lanes of a warp must call together.
#pragma once
#include "ptx.cuh"

enum CacheKind { fp8, q4, q8 };

constexpr int lane_values = 8, chunk_values = 64, group_values = 32;
static_assert(chunk_values == 8 * lane_values && group_values == 4 * lane_values, "8 lanes a chunk, 4 lanes a scale");

template <CacheKind kind> constexpr uint32 cache_levels = kind == q4 ? 8 : 128;
template <CacheKind kind> constexpr int cache_code_words = kind == q4 ? 1 : 2;  // 32-bit words of a lane's 8 codes

typedef Vector<uint32, 4> LaneValues;
template <CacheKind kind> using LaneCodes = Vector<uint32, cache_code_words<kind>>;

// 2^exponent as a pair of float16, for exponents that need no subnormal.
constexpr uint32 pair_of_power(int exponent) { return (uint32)(15 + exponent) * 0x04000400u; }
constexpr uint32 pair_one = pair_of_power(0), pair_minus_one = pair_one | 0x80008000u, pair_1024 = pair_of_power(10);
static_assert(pair_one == 0x3c003c00u && pair_1024 == 0x64006400u, "float16 has a bias of 15 and 10 mantissa bits");

// The 32-point Sylvester-Hadamard transforms of a chunk's even and odd values, each stage rounded to float16.
__device__ __forceinline__ void hadamard_chunk(LaneValues &t) {
    for (int stride = 1; stride < 4; stride *= 2)
        for (int i = 0; i < 4; i++)
            if (!(i & stride)) {
                uint32 low = t[i], high = t[i + stride];
                t[i] = fma_half2(high, pair_one, low);
                t[i + stride] = fma_half2(high, pair_minus_one, low);
            }
    for (int lanes = 1; lanes < 8; lanes *= 2) {
        uint32 sign = threadIdx.x & lanes ? pair_minus_one : pair_one;
        for (int i = 0; i < 4; i++) t[i] = fma_half2(t[i], sign, __shfl_xor_sync(0xffffffffu, t[i], lanes));
    }
}

// The lane's 8 values (overwritten) -> their codes, and the scale that its group of 4 lanes shares.
template <CacheKind kind> __device__ __forceinline__ half encode_chunk(LaneValues &t, LaneCodes<kind> &codes) {
    constexpr uint32 levels = cache_levels<kind>;
    constexpr uint32 pair_levels = pair_of_power(kind == q4 ? 3 : 7);
    hadamard_chunk(t);

    // Magnitudes sort as integers do, NaN above all. A low half decides only between equal high halves, and is cut off.
    uint32 low = 0, high = 0;
    for (int i = 0; i < 4; i++) {
        low = max(low, t[i] & 0x7fffu);
        high = max(high, t[i] & 0x7fffffffu);
    }
    uint32 largest = max(low, high >> 16);
    for (int lanes = 1; lanes < 4; lanes *= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));

    // t / largest, rounded to float16, is the rounded product with the rounded reciprocal: that is off by 2^-23 of itself
    // at most, and no quotient of two float16 values is so near to the middle of two others (test_kv_codec.py tries all).
    float reciprocal = 1.0f / to_float(half{(uint16)largest});
    uint32 code[lane_values];
    for (int i = 0; i < 4; i++) {
        float even = to_float(half{(uint16)t[i]}), odd = to_float(half{(uint16)(t[i] >> 16)});
        uint32 placed = fma_half2(pack_pair<half>(even * reciprocal, odd * reciprocal), pair_levels, pair_levels);
        // 0 to 2 * levels. From 1024 on float16 counts in ones: this sum rounds to even, and its last bits are the code.
        uint32 rounded = fma_half2(placed, pair_one, pair_1024);
        for (int h = 0; h < 2; h++) {
            uint32 q = (h ? rounded >> 16 : rounded & 0xffffu) - (pair_1024 & 0xffffu);
            code[2 * i + h] = q > 2 * levels ? 0 : min(q, 2 * levels - 1);  // beyond are only the bits of NaN
        }
    }
    constexpr int bits = kind == q4 ? 4 : 8, per_word = 32 / bits;
    for (int w = 0; w < cache_code_words<kind>; w++) {
        codes[w] = 0;
        for (int i = 0; i < per_word; i++) codes[w] |= code[w * per_word + i] << (bits * i);
    }
    return half{(uint16)mul_half2(largest, pair_of_power(kind == q4 ? -3 : -7))};
}

// The codes of the lane's 8 values and the scale of its group -> the values.
template <CacheKind kind> __device__ __forceinline__ LaneValues decode_chunk(const LaneCodes<kind> &codes, half scale) {
    constexpr uint32 pair_zero_code = pair_1024 + cache_levels<kind> * 0x10001u;  // 1024 + levels
    LaneValues t;
    for (int i = 0; i < 4; i++) {
        uint32 raised;  // 1024 + code: the code as the last bits of 1024
        if constexpr (kind == q4) {
            uint32 byte = codes[0] >> (8 * i);
            raised = pair_1024 | (byte & 0x0fu) | (byte & 0xf0u) << 12;
        } else {
            raised = __byte_perm(codes[i / 2], pair_1024 >> 8, i % 2 ? 0x4342 : 0x4140);
        }
        t[i] = mul_half2(sub_half2(raised, pair_zero_code), scale.bits * 0x10001u);
    }
    hadamard_chunk(t);
    for (int i = 0; i < 4; i++) t[i] = mul_half2(t[i], pair_of_power(-5));
    return t;
}

// fp8 is the upper byte of each value.
__device__ __forceinline__ LaneCodes<fp8> encode_fp8(const LaneValues &t) {
    LaneCodes<fp8> codes;
    for (int w = 0; w < 2; w++) codes[w] = __byte_perm(t[2 * w], t[2 * w + 1], 0x7531);
    return codes;
}
__device__ __forceinline__ LaneValues decode_fp8(const LaneCodes<fp8> &codes) {
    LaneValues t;
    for (int i = 0; i < 4; i++) t[i] = __byte_perm(codes[i / 2], 0, i % 2 ? 0x3424 : 0x1404);
    return t;
}

// A lane's words: in one access where `aligned`, else in as many as the array's own type needs.
template <bool aligned, typename Words, typename T> __device__ __forceinline__ Words load_words(const T *from) {
    if constexpr (aligned) return *(const Words *)from;
    Words words = {};
    for (int i = 0; i < (int)(sizeof(Words) / sizeof(T)); i++) {
        int bit = i * 8 * sizeof(T);
        words[bit / 32] |= (uint32)from[i] << (bit % 32);
    }
    return words;
}
template <bool aligned, typename Words, typename T> __device__ __forceinline__ void store_words(
    T *to, const Words &words) {
    if constexpr (aligned) {
        *(Words *)to = words;
    } else {
        for (int i = 0; i < (int)(sizeof(Words) / sizeof(T)); i++) {
            int bit = i * 8 * sizeof(T);
            to[i] = (T)(words[bit / 32] >> (bit % 32));
        }
    }
}

// Values [begin, end) of the flat tensor.
struct CacheSpan {
    int64 begin, end;
    __device__ bool holds(int64 first, int count) const { return first >= begin && first + count <= end; }
};

// Where tokens [first, last) of sequence b lie that are in its page `piece`, counted from the page of `first`: empty where
// there are none, or where the block table names no page. Without a block table row b is the only page of sequence b.
__device__ __forceinline__ CacheSpan cache_span(
    const int *block_table,  // [batch, max_pages] or null
    int64 first, int64 last, int b, int piece, int pages, int page_size, int max_pages, int token_values) {
    if (first < 0) return {0, 0};
    int64 logical = first / page_size + piece;
    first = max(first, logical * page_size);
    last = min(last, (logical + 1) * page_size);
    if (first >= last || logical >= max_pages) return {0, 0};
    int64 page = block_table ? block_table[(int64)b * max_pages + logical] : b;
    if (page < 0 || page >= pages) return {0, 0};
    int64 moved = (page - logical) * page_size;
    return {(first + moved) * token_values, (last + moved) * token_values};
}

// The lanes' shares of 8 values that cover a span: whole chunks, but for fp8 just what holds the values.
template <CacheKind kind> __device__ __forceinline__ CacheSpan lane_shares(const CacheSpan &span) {
    constexpr int64 unit = kind == fp8 ? lane_values : chunk_values;
    return {span.begin / unit * (unit / lane_values), (span.end + unit - 1) / unit * (unit / lane_values)};
}
