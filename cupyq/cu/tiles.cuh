// Reading the tiles of formats/tiles.py: loading a lane's words of one 32 x 32 block, and taking values out of them.
#pragma once
#include "ptx.cuh"

constexpr int TILE = 32;

// Row inside the block and column inside the tile of pair p of a lane: its low and high value are rows row and row + 1.
__device__ __forceinline__ int pair_row(int lane, int p) { return 16 * (p / 2 % 2) + 8 * (p % 2) + 2 * (lane % 4); }
__device__ __forceinline__ int pair_column(int lane, int p) { return 4 * (lane / 4) + p / 4; }

// The words of one lane in one block.
template <int bits> struct LaneWords {
    uint32 word[bits];

    // Of a block in global memory that is read once, or in shared memory. It begins at a multiple of 16 bytes.
    __device__ __forceinline__ void load(const uint32 *block, int lane) {
        read([](auto p) { return load_streaming(p); }, block, lane);
    }
    __device__ __forceinline__ void load_shared(const uint32 *block, int lane) {
        read([](auto p) { return *p; }, block, lane);
    }

private:
    template <typename Load> __device__ __forceinline__ void read(Load load, const uint32 *block, int lane) {
        if constexpr (bits >= 4) {
            uint4 v = load((const uint4 *)block + lane);
            word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
            if constexpr (bits == 5) word[4] = load(block + 128 + lane);
            if constexpr (bits == 6) {
                uint2 u = load((const uint2 *)(block + 128) + lane);
                word[4] = u.x, word[5] = u.y;
            }
            if constexpr (bits == 8) {
                uint4 u = load((const uint4 *)(block + 128) + lane);
                word[4] = u.x, word[5] = u.y, word[6] = u.z, word[7] = u.w;
            }
        } else {
            uint2 v = load((const uint2 *)block + lane);
            word[0] = v.x, word[1] = v.y;
            if constexpr (bits == 3) word[2] = load(block + 64 + lane);
        }
    }
};

// What arithmetic on pairs of T uses: `magic` is 2^mantissa, so that magic | code << s is 2^mantissa + code * 2^s, exactly,
// while code << s stays inside the mantissa. Turing has no arithmetic on pairs of bfloat16: pairs of half take their place,
// and are converted (`from`).
template <typename T> struct PairNumbers;
template <> struct PairNumbers<half> {
    using type = half;
    static constexpr int mantissa = 10;
    static constexpr uint32 magic = 0x64006400u, one = 0x3c003c00u;
    // Two copies of a number above 0 that a half holds; a constant where x is one.
    static __device__ __forceinline__ uint32 both(float x) {
        return (__float_as_uint(x) - (112u << 23) >> 13) * 0x10001u;
    }
    static __device__ __forceinline__ uint32 fma(uint32 x, uint32 y, uint32 z) { return fma_half2(x, y, z); }
    static __device__ __forceinline__ uint32 from(uint32 x) { return x; }
};
template <> struct PairNumbers<bfloat16> {
#if __CUDA_ARCH__ >= 800
    using type = bfloat16;
    static constexpr int mantissa = 7;
    static constexpr uint32 magic = 0x43004300u, one = 0x3f803f80u;
    static __device__ __forceinline__ uint32 both(float x) { return (__float_as_uint(x) >> 16) * 0x10001u; }
    static __device__ __forceinline__ uint32 fma(uint32 x, uint32 y, uint32 z) { return fma_bfloat162(x, y, z); }
    static __device__ __forceinline__ uint32 from(uint32 x) { return x; }
#else
    using type = half;
    static __device__ __forceinline__ uint32 from(uint32 x) {  // small whole numbers: the lower half of a float is zero
        half low{(uint16)(x & 0xffffu)}, high{(uint16)(x >> 16)};
        return __float_as_uint(to_float(low)) >> 16 | __float_as_uint(to_float(high));
    }
#endif
};

// Pair p as numbers: 2^mantissa + code * 2^place(p) in both halves. All but the words is constant where p is (unrolled).
//
// A field that lies inside the mantissa is taken as it is, another after a shift of the whole word: by as few different
// amounts as will do, so that the fields share the shifted word. The bits of a spread pair are brought side by side by shifts
// that fall from word to word, by the same as the word's upper fields where that fits them.
template <typename T, int bits> struct PairFields {
    using Numbers = PairNumbers<T>;
    static constexpr int mantissa = Numbers::mantissa;
    static constexpr int whole = 16 / bits, spread = whole * bits;  // pairs >= spread are spread over the words
    static_assert(bits <= mantissa, "a code must fit the mantissa");

    // Bit p of word w goes to bit place(p) + w: this shift, less w. As many spread pairs as find room share one.
    static __device__ __forceinline__ constexpr int spread_shift(int p) {
        int together = mantissa - bits + 1;
        int last = spread + (p - spread) / together * together + together - 1;
        return (last < 15 ? last : 15) + bits - mantissa;
    }
    static __device__ __forceinline__ constexpr int field_shift(int w, int at) {
        constexpr int inside = mantissa / bits * bits;
        if (at < inside) return 0;
        int shared = spread_shift(15) - w;
        if (spread < 16 && shared <= at && at - shared + bits <= mantissa) return shared;
        return at / inside * inside;
    }
    static __device__ __forceinline__ constexpr int place(int p) {
        if (p >= spread) return p - spread_shift(p);
        int at = p % whole * bits;
        return at - field_shift(p / whole, at);
    }

    static __device__ __forceinline__ uint32 take(const LaneWords<bits> &words, int p) {
        constexpr uint32 ones = 0x10001u;
        if (p < spread) {
            int w = p / whole;
            uint32 shifted = words.word[w] >> field_shift(w, p % whole * bits);
            return and_or(shifted, ((1u << bits) - 1) * ones << place(p), Numbers::magic);
        }
        uint32 value = Numbers::magic;
#pragma unroll
        for (int w = 0; w < bits; w++)
            value = and_or(words.word[w] >> (spread_shift(p) - w), ones << (place(p) + w), value);
        return value;
    }
};

// Code + 2^(mantissa - s) of pair p, plus what addend(s) says.
template <typename T, int bits, typename Addend>
__device__ __forceinline__ uint32 pair_values(const LaneWords<bits> &words, int p, Addend addend) {
    using Fields = PairFields<T, bits>;
    int s = Fields::place(p);
    return PairNumbers<T>::fma(Fields::take(words, p), PairNumbers<T>::both(1.0f / (1 << s)), addend(s));
}

// Codes of 8 bits minus 128 in bfloat16, whose numbers have 8 bits with the leading one: the upper bit apart from the others.
__device__ __forceinline__ uint32 byte_pair_values(const LaneWords<8> &words, int p) {
    uint32 codes = words.word[p / 2] >> p % 2 * 8;
    uint32 low = and_or(codes, 0x007f007fu, 0x43004300u);    // 128 + code % 128
    uint32 high = and_xor(codes, 0x00800080u, 0xc380c380u);  // -128 where code >= 128, else -256
    return fma_bfloat162(low, 0x3f803f80u, high);            // the sum
}

// Code minus zero, both values of pair p in T, exact; p is a compile-time constant once unrolled.
// Where the zero is 2^(bits - 1):
template <typename T, int bits> struct FixedZero {
    static __device__ __forceinline__ uint32 values(const LaneWords<bits> &words, int p) {
        using Type = typename PairNumbers<T>::type;
        using Numbers = PairNumbers<Type>;
        if constexpr (is_same<Type, bfloat16> && bits == 8) {
            return byte_pair_values(words, p);
        } else {
            uint32 difference = pair_values<Type>(words, p, [](int s) {
                return Numbers::both((1 << Numbers::mantissa >> s) + (1 << (bits - 1))) | 0x80008000u;
            });
            return PairNumbers<T>::from(difference);
        }
    }
};

// Where it is a column's own, a whole number from 0 to 2^bits:
template <typename T, int bits> struct ZeroPoint {
    using Type = typename PairNumbers<T>::type;
    using Numbers = PairNumbers<Type>;
    static constexpr bool is_byte = is_same<Type, bfloat16> && bits == 8;
    uint32 zero;  // in both halves; of bytes in bfloat16, which come as code - 128: 128 - zero, to be added

    __device__ __forceinline__ explicit ZeroPoint(float value) {
        if constexpr (is_byte) value = 128 - value;
        zero = pack_pair<Type>(value, value);
    }
    __device__ __forceinline__ explicit ZeroPoint(half value) {
        if constexpr (is_same<Type, half>)
            zero = value.bits * 0x10001u;
        else
            *this = ZeroPoint(to_float(value));
    }

    __device__ __forceinline__ uint32 values(const LaneWords<bits> &words, int p) const {
        if constexpr (is_byte) {
            return Numbers::fma(byte_pair_values(words, p), Numbers::one, zero);
        } else {
            uint32 difference = pair_values<Type>(words, p, [&](int s) {
                return Numbers::fma(
                    zero, Numbers::one | 0x80008000u, Numbers::both(1 << Numbers::mantissa >> s) | 0x80008000u);
            });
            return PairNumbers<T>::from(difference);
        }
    }
};

// Of a set of widths, bit by bit: the widest, and whether there is only one.
constexpr int widest(int widths) {
    int bits = 8;
    while (!(widths >> bits & 1)) bits--;
    return bits;
}
constexpr bool is_one_width(int widths) { return widths == 1 << widest(widths); }

// Call f(constant<bits>) for a width known at run time.
template <int value> struct constant {
    static constexpr int bits = value;
};
template <typename F> __device__ __forceinline__ void with_width(int bits, F f) {
    switch (bits) {
        case 2: f(constant<2>()); break;
        case 3: f(constant<3>()); break;
        case 4: f(constant<4>()); break;
        case 5: f(constant<5>()); break;
        case 6: f(constant<6>()); break;
        case 8: f(constant<8>()); break;
    }
}
