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

enum CacheKind { fp8, q4, q8, e4m3, dense };  // dense: values as they are, where a kernel takes arrays as well as codes

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

// e4m3: a float8 with 4 bits of exponent and 3 of mantissa. The nearest to x, which is finite: ties to even, at most 448.
__device__ __forceinline__ uint32 e4m3_code(float x) {
    uint32 bits = __float_as_uint(x), magnitude = min(bits & 0x7fffffffu, __float_as_uint(448.0f));
    uint32 code = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u) >> 20) - (127 - 7 << 3);
    // Subnormals are multiples of 2^-9, in which floats count from 2^14 on: the sum rounds to even.
    if (magnitude < __float_as_uint(0x1p-6f))
        code = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 0x1p14f)) - __float_as_uint(0x1p14f);
    return code | (bits >> 24 & 0x80u);
}
__device__ __forceinline__ uint32 e4m3_code_pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
    uint16 codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
#else
    return e4m3_code(low) | e4m3_code(high) << 8;
#endif
}
// Its bits as those of a float16, whose exponents are biased by 8 more, are 2^-8 of the value, subnormals too.
__device__ __forceinline__ float e4m3_value(uint32 code) {
    half raised = {(uint16)((code & 0x80u) << 8 | (code & 0x7fu) << 7)};
    return (code & 0x7fu) == 0x7fu ? nan_float() : to_float(raised) * 256;
}

template <typename T> __device__ __forceinline__ half as_half(T x) {
    if constexpr (is_same<T, half>)
        return x;
    else
        return from_float<half>(to_float(x));
}

// The codes of a head's values, and their scale, by a warp in accesses of `vector` values.
template <int vector, typename T>
__device__ __forceinline__ void encode_e4m3(const T *from, uint8 *codes, half *scale, int head_dim) {
    int lane = threadIdx.x % 32;
    uint32 largest = 0;  // magnitudes sort as integers do, NaN above all
    for (int c = lane * vector; c < head_dim; c += 32 * vector) {
        auto xs = *(const Vector<T, vector> *)(from + c);
        for (int i = 0; i < vector; i++) largest = max(largest, as_half(xs[i]).bits & 0x7fffu);
    }
    for (int lanes = 1; lanes < 32; lanes *= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    bool is_usable = largest > 0 && largest < 0x7c00u;
    float exact = __fdiv_rn(to_float(half{(uint16)largest}), 448.0f);
    float rounded = is_usable ? fminf(fmaxf(to_float(from_float<half>(exact)), 0x1p-14f), 146.125f) : 1.0f;
    uint32 useless = largest ? 0x7fu : 0;  // the code of NaN or 0
    for (int c = lane * vector; c < head_dim; c += 32 * vector) {
        auto xs = *(const Vector<T, vector> *)(from + c);
        Vector<uint8, vector> lane_codes;
        for (int i = 0; i < vector; i += 2) {
            float low = __fdiv_rn(to_float(as_half(xs[i])), rounded);
            float high = i + 1 < vector ? __fdiv_rn(to_float(as_half(xs[(i + 1) % vector])), rounded) : 0.0f;
            uint32 pair = e4m3_code_pair(low, high);
            lane_codes[i] = (uint8)(is_usable ? pair : useless);
            if (i + 1 < vector) lane_codes[(i + 1) % vector] = (uint8)(is_usable ? pair >> 8 : useless);
        }
        *(Vector<uint8, vector> *)(codes + c) = lane_codes;
    }
    if (lane == 0) *scale = is_usable ? from_float<half>(rounded) : half{(uint16)(largest ? 0x7fffu : 0u)};
}
template <int vector>
__device__ __forceinline__ void decode_e4m3(const uint8 *codes, float scale, half *to, int head_dim) {
    for (int c = threadIdx.x % 32 * vector; c < head_dim; c += 32 * vector) {
        auto lane_codes = *(const Vector<uint8, vector> *)(codes + c);
        Vector<half, vector> xs;
        for (int i = 0; i < vector; i++) xs[i] = from_float<half>(e4m3_value(lane_codes[i]) * scale);
        *(Vector<half, vector> *)(to + c) = xs;
    }
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

// The lanes' shares of 8 values that cover a span: whole chunks, but for fp8 just what holds the values. (e4m3 goes by heads.)
template <CacheKind kind> __device__ __forceinline__ CacheSpan lane_shares(const CacheSpan &span) {
    constexpr int64 unit = kind == fp8 ? lane_values : chunk_values;
    return {span.begin / unit * (unit / lane_values), (span.end + unit - 1) / unit * (unit / lane_values)};
}

// The place of a token among the flat tokens of a cache, or -1: outside of the capacity, or in no page that there is. Without a
// block table row b is the only page of sequence b, and max_pages is 1.
__device__ __forceinline__ int64 token_slot(
    const int *block_table,  // [at least batch, max_pages] or null
    int64 position, int b, int pages, int page_size, int max_pages) {
    if (position < 0 || position >= (int64)max_pages * page_size) return -1;
    if (!block_table) return (int64)b * page_size + position;
    uint32 logical = (uint32)position / (uint32)page_size;
    int page = block_table[(int64)b * max_pages + logical];
    if (page < 0 || page >= pages) return -1;
    return ((int64)page - logical) * page_size + position;
}

// A head's values into the cache, by a warp in accesses of `vector` values: `vector` > 1 says too that codes start at multiples
// of 8 bytes. Values that are no float16 become one first.
template <CacheKind kind, int vector, typename T>
__device__ __forceinline__ void store_head(
    const T *from,  // [head_dim]; q4, q8: whole chunks
    void *cache,    // [heads of all tokens, head_dim] of T, or of codes
    half *scales,   // [heads of all tokens, head_dim / 32], e4m3: [heads of all tokens]; dense, fp8: null
    int64 head, int head_dim) {
    int lane = threadIdx.x % 32;
    int64 first = head * head_dim;
    if constexpr (kind == e4m3) {
        encode_e4m3<vector>(from, (uint8 *)cache + first, scales + head, head_dim);
    } else if constexpr (kind == dense) {
        for (int c = lane * vector; c < head_dim; c += 32 * vector)
            *(Vector<T, vector> *)((T *)cache + first + c) = *(const Vector<T, vector> *)(from + c);
    } else if constexpr (kind == fp8) {
        for (int c = lane * vector; c < head_dim; c += 32 * vector) {
            auto xs = *(const Vector<T, vector> *)(from + c);
            Vector<uint8, vector> codes;
            for (int i = 0; i < vector; i++) codes[i] = (uint8)(as_half(xs[i]).bits >> 8);
            *(Vector<uint8, vector> *)((uint8 *)cache + first + c) = codes;
        }
    } else {
        constexpr int code_bytes = 4 * cache_code_words<kind>;
        for (int base = 0; base < head_dim; base += 32 * lane_values) {  // the lanes of a warp stay together
            int c = base + lane * lane_values;
            LaneValues values = {};
            if (c < head_dim)
                for (int v = 0; v < lane_values; v += vector) {
                    auto xs = *(const Vector<T, vector> *)(from + c + v);
                    for (int i = 0; i < vector; i++)
                        values[(v + i) / 2] |= (uint32)as_half(xs[i]).bits << ((v + i) % 2 * 16);
                }
            LaneCodes<kind> codes;
            half scale = encode_chunk<kind>(values, codes);
            if (c < head_dim) {
                store_words<(vector > 1)>((uint8 *)cache + (first + c) / lane_values * code_bytes, codes);
                if (lane % 4 == 0) scales[(first + c) / group_values] = scale;
            }
        }
    }
}
