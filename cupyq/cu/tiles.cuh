// Reading the tiles of formats/tiles.py: loading a lane's words of one 32 x 32 block, and taking values out of them.
#pragma once
#include "ptx.cuh"

constexpr int TILE = 32;

// Width of the first plane of a block; the second, if any, has the remaining bits.
constexpr int low_plane(int bits) { return bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits; }
static_assert(low_plane(3) == 2 && low_plane(6) == 4 && low_plane(8) == 8, "PLANES in formats/tiles.py");

// The words of one lane in one block.
template <int bits> struct LaneWords {
    uint32 word[bits];

    __device__ __forceinline__ void load(const uint32 *block, int lane) {
        if constexpr (bits >= 4) {
            uint4 v = load_streaming((const uint4 *)block + lane);
            word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
            if constexpr (bits == 5) word[4] = load_streaming(block + 128 + lane);
            if constexpr (bits == 6) {
                uint2 u = load_streaming((const uint2 *)(block + 128) + lane);
                word[4] = u.x, word[5] = u.y;
            }
            if constexpr (bits == 8) {
                uint4 u = load_streaming((const uint4 *)(block + 128) + lane);
                word[4] = u.x, word[5] = u.y, word[6] = u.z, word[7] = u.w;
            }
        } else {
            uint2 v = load_streaming((const uint2 *)block + lane);
            word[0] = v.x, word[1] = v.y;
            if constexpr (bits == 3) word[2] = load_streaming(block + 64 + lane);
        }
    }

    // Codes of pair p in the low and high half, each with `base` or-ed in; p is a compile-time constant once unrolled.
    template <uint32 base = 0> __device__ __forceinline__ uint32 pair(int p) const {
        constexpr int low = low_plane(bits), high = bits - low;
        constexpr uint32 low_mask = ((1u << low) - 1) * 0x10001u;
        uint32 codes = and_or<low_mask, base>(word[p / (16 / low)] >> p % (16 / low) * low);
        if constexpr (high > 0) {
            constexpr uint32 high_mask = ((1u << high) - 1 << low) * 0x10001u;
            uint32 field = word[low + p / (16 / high)];
            int shift = p % (16 / high) * high - low;
            codes |= (shift >= 0 ? field >> shift : field << -shift) & high_mask;
        }
        return codes;
    }
};

// The zero point of a column as pair arithmetic wants it, and values minus zero from codes: exact in both types.
//
// half: 0x6400 | code is 1024 + code, so one subtraction of 1024 + zero leaves the value.
// bfloat16: 0x4300 | code is 128 + code for codes below 128; wider codes, and Turing, go through fp32.
template <typename T, int bits> struct ZeroPoint;

template <int bits> struct ZeroPoint<half, bits> {
    uint32 bias;
    __device__ __forceinline__ explicit ZeroPoint(float zero) : bias(pack_pair<half>(1024 + zero, 1024 + zero)) {}
    __device__ __forceinline__ uint32 values(const LaneWords<bits> &words, int p) const {
        return sub_half2(words.template pair<0x64006400u>(p), bias);
    }
};

template <int bits> struct ZeroPoint<bfloat16, bits> {
#if __CUDA_ARCH__ >= 800
    static constexpr bool is_paired = bits < 8;
#else
    static constexpr bool is_paired = false;
#endif
    float zero;
    uint32 bias;
    __device__ __forceinline__ explicit ZeroPoint(float zero)
        : zero(zero), bias(pack_pair<bfloat16>(-128 - zero, -128 - zero)) {}
    __device__ __forceinline__ uint32 values(const LaneWords<bits> &words, int p) const {
        if constexpr (is_paired) return fma_bfloat162(words.template pair<0x43004300u>(p), 0x3f803f80u, bias);
        uint32 codes = words.pair(p);
        return pack_pair<bfloat16>((float)(codes & 0xffffu) - zero, (float)(codes >> 16) - zero);
    }
};

// Row inside the block and column inside the tile of pair p of a lane: values p.low and p.high are rows row, row + 1.
__device__ __forceinline__ int pair_row(int lane, int p) { return 8 * (lane % 4) + 2 * (p % 4); }
__device__ __forceinline__ int pair_column(int lane, int p) { return 4 * (lane / 4) + p / 4; }

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
