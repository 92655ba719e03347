// Checkpoint tensors to the kernels' form, once at load.
//
// repack_weights  packed streams down the columns (EXL2 q_weight, GPTQ qweight) -> tiles (formats/tiles.py)
// exl2_scales     scale[g, n] = RN16((code + 1)^2 * base[g]), base = RN16(q_scale_max * prescale / 256), in fp16
// gptq_scales     scale[g, n], fp16 as it is
// gptq_zeros      zero[g, n] = (stored + offset) & mask (formats/gptq.py: zero_rule), as fp16: exact, 256 included
// widen_bias      bias[n] of T as fp32
//
// Work split  repack_weights: one warp per 32 x 32 tile, a lane per column to read and as the tile has it to write; scales and
//             zeros: one warp per column tile and group, tile-major; columns from n on get scale 0 and zero 0.
// Numerics    integers, except the one rounding of exl2_scales.
// Limits      codes of 2, 3, 4, 5, 6 or 8 bits, groups up to 8 * 65535, 32-row blocks up to 8 * 65535.
// Traffic     every packed word, scale and zero read and written once (packed words from L1 once per code; GPTQ in an order of
//             its own reads them anew for every row).
// Reference   formats/tiles.py: pack_tiles; formats/exl2.py: exl2_scales; formats/gptq.py: unpack_gptq
#include "tiles.cuh"

// 8 warps a block, one block of rows each.
__global__ void __launch_bounds__(256) repack_weights(
    const uint32 *packed,    // [words, n]
    const int *packed_row,   // [32 * blocks]: stored row -> row of the streams, -1: none; null: identity
    const int *block_bits,   // [blocks]
    const int *block_start,  // [blocks]: first word inside a column tile
    uint32 *tiles,           // [column tiles, words_per_column_tile]
    int n, int blocks, int words_per_column_tile) {
    constexpr int stride =
        TILE + 4;  // of sCodes in bytes: lanes that read different rows mostly meet in different banks
    __shared__ uint8 sCodes[8][TILE * stride];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = blockIdx.y * 8 + warp;
    if (block >= blocks) return;
    int start = block_start[block], column = blockIdx.x * TILE + lane;
    uint8 *codes = sCodes[warp];

    with_width(block_bits[block], [&](auto width) {
        constexpr int bits = decltype(width)::bits;
        const uint32 *stream = packed + column;
        // A stream in stored order has no gaps: a block's first word in its column is the tiles' before it, by their 32 lanes.
        if (!packed_row) stream += (int64)(start / 32) * n;
#pragma unroll 8
        for (int row = 0; row < TILE; row++) {
            int from = packed_row ? packed_row[block * TILE + row] : row;
            uint32 code = 0;
            if (from >= 0 && column < n) {
                int64 bit = (int64)from * bits;
                const uint32 *word = stream + bit / 32 * n;
                int shift = bit % 32;
                code = *word >> shift;
                if (shift + bits > 32) code |= word[n] << (32 - shift);  // straddles two words
            }
            codes[row * stride + lane] = code & ((1u << bits) - 1);
        }
        __syncwarp();

        constexpr int whole = 16 / bits, spread = whole * bits;
        uint32 words[bits] = {};
#pragma unroll
        for (int p = 0; p < 16; p++) {
            const uint8 *at = codes + pair_row(lane, p) * stride + pair_column(lane, p);
            uint32 pair = at[0] | (uint32)at[stride] << 16;
#pragma unroll
            for (int w = 0; w < bits; w++) {
                if (w == p / whole) words[w] |= pair << p % whole * bits;
                if (p >= spread) words[w] |= (pair >> w & 0x10001u) << p;
            }
        }
        uint32 *out = tiles + (int64)blockIdx.x * words_per_column_tile + start;
        constexpr int first_part = bits < 4 ? 2 : 4, second_part = bits - first_part;
        for (int w = 0; w < first_part; w++) out[lane * first_part + w] = words[w];
        for (int w = 0; w < second_part; w++) out[32 * first_part + lane * second_part + w] = words[first_part + w];
    });
}

// Of the scales and zeros kernels: 8 warps a block, one group each.
__global__ void __launch_bounds__(256) exl2_scales(
    const uint32 *q_scale,  // [groups, n / 8]
    const half *base,       // [groups]
    half *scales,           // [column tiles, groups, 32]
    int n, int groups) {
    int lane = threadIdx.x % 32, group = blockIdx.y * 8 + threadIdx.x / 32, column = blockIdx.x * TILE + lane;
    if (group >= groups) return;
    half scale{0};
    if (column < n) {
        float code = q_scale[(int64)group * (n / 8) + column / 8] >> 4 * (column % 8) & 15;
        scale = from_float<half>((code + 1) * (code + 1) * to_float(base[group]));
    }
    scales[((int64)blockIdx.x * groups + group) * TILE + lane] = scale;
}

__global__ void __launch_bounds__(256) gptq_scales(
    const half *x,  // [groups, n]
    half *scales,   // [column tiles, groups, 32]
    int n, int groups) {
    int lane = threadIdx.x % 32, group = blockIdx.y * 8 + threadIdx.x / 32, column = blockIdx.x * TILE + lane;
    if (group >= groups) return;
    scales[((int64)blockIdx.x * groups + group) * TILE + lane] = column < n ? x[(int64)group * n + column] : half{0};
}

__global__ void __launch_bounds__(256) gptq_zeros(
    const uint32 *qzeros,  // [groups, n * bits / 32]
    half *zeros,           // [column tiles, groups, 32]
    int n, int groups, int bits, int offset, int mask) {
    int lane = threadIdx.x % 32, group = blockIdx.y * 8 + threadIdx.x / 32, column = blockIdx.x * TILE + lane;
    if (group >= groups) return;
    int zero = 0;
    if (column < n) {
        int64 bit = (int64)column * bits;
        const uint32 *word = qzeros + (int64)group * ((int64)n * bits / 32) + bit / 32;
        int shift = bit % 32;
        uint32 value = *word >> shift;
        if (shift + bits > 32) value |= word[1] << (32 - shift);
        zero = (int)(value & ((1u << bits) - 1)) + offset & mask;
    }
    zeros[((int64)blockIdx.x * groups + group) * TILE + lane] = from_float<half>((float)zero);
}

template <typename T>
__global__ void __launch_bounds__(256) widen_bias(
    const T *x,   // [n]
    float *bias,  // [n]
    int n) {
    int column = blockIdx.x * 256 + threadIdx.x;
    if (column < n) bias[column] = to_float(x[column]);
}
