// Checkpoint tensors to the kernels' form, once at load.
//
// repack_weights  packed streams down the columns (EXL2 q_weight, GPTQ qweight) -> tiles (formats/tiles.py)
// exl2_scales     scale[g, n] = RN16((code + 1)^2 * base[g]), base = RN16(q_scale_max * prescale / 256), in fp16
// gptq_zeros      zero[g, n] = (stored + offset) & mask (formats/gptq.py: zero_rule), as fp16: exact, 256 included
// pad_columns     fp16 [rows, n] -> [rows, padded_n], zeros in the new columns
//
// Work split  repack_weights: one warp per 32 x 32 tile; the others one thread per value.
// Numerics    integers, except the one rounding of exl2_scales.
// Limits      codes of 2, 3, 4, 5, 6 or 8 bits, groups up to 2^31, 32-row blocks up to 8 * 65535.
// Traffic     every packed word, scale and zero read and written once (the words of 3, 5 and 6 bits partly twice, from L1).
// Reference   formats/tiles.py: pack_tiles; formats/exl2.py: exl2_scales; formats/gptq.py: unpack_gptq
#include "tiles.cuh"

// 8 warps a block, one block of rows each.
__global__ void __launch_bounds__(256) repack_weights(
    const uint32 *packed,     // [words, n]
    const int64 *bit_offset,  // [32 * blocks]: first bit of a stored row in its column's stream, -1: no such row
    const int *block_bits,    // [blocks]
    const int *block_start,   // [blocks]: first word inside a column tile
    uint32 *tiles,            // [column tiles, words_per_column_tile]
    int n, int blocks, int words_per_column_tile) {
    int lane = threadIdx.x % 32;
    int block = blockIdx.y * 8 + threadIdx.x / 32;
    if (block >= blocks) return;
    uint32 *out = tiles + (int64)blockIdx.x * words_per_column_tile + block_start[block];

    auto code = [&](int row, int column, uint32 mask) -> uint32 {
        int64 bit = bit_offset[block * TILE + row];
        if (bit < 0 || column >= n) return 0;
        const uint32 *word = packed + (bit / 32) * n + column;
        int shift = bit % 32;
        uint32 value = *word >> shift;
        if ((mask << shift) >> shift != mask) value |= word[n] << (32 - shift);  // straddles two words
        return value & mask;
    };

    with_width(block_bits[block], [&](auto width) {
        constexpr int bits = decltype(width)::bits, low = low_plane(bits), high = bits - low;
        uint32 words[bits] = {};
        for (int p = 0; p < 16; p++) {
            int column = blockIdx.x * TILE + pair_column(lane, p), row = pair_row(lane, p);
            uint32 pair = code(row, column, (1u << bits) - 1) | code(row + 1, column, (1u << bits) - 1) << 16;
            for (int w = 0; w < bits; w++) {  // constant indices keep the words in registers
                if (w == p / (16 / low)) words[w] |= (pair & ((1u << low) - 1) * 0x10001u) << p % (16 / low) * low;
                if constexpr (high > 0)
                    if (w == low + p / (16 / high))
                        words[w] |= (pair >> low & ((1u << high) - 1) * 0x10001u) << p % (16 / high) * high;
            }
        }
        constexpr int first_part = bits < 4 ? 2 : 4, second_part = bits - first_part;
        for (int w = 0; w < first_part; w++) out[lane * first_part + w] = words[w];
        for (int w = 0; w < second_part; w++) out[32 * first_part + lane * second_part + w] = words[first_part + w];
    });
}

__global__ void __launch_bounds__(256) exl2_scales(
    const uint32 *q_scale,  // [groups, n / 8]
    const half *base,       // [groups]
    half *scales,           // [groups, padded_n]
    int n, int padded_n) {
    int column = blockIdx.y * 256 + threadIdx.x, group = blockIdx.x;
    if (column >= padded_n) return;
    float code = column < n ? (float)(q_scale[(int64)group * (n / 8) + column / 8] >> 4 * (column % 8) & 15) : -1.0f;
    scales[(int64)group * padded_n + column] = from_float<half>((code + 1) * (code + 1) * to_float(base[group]));
}

__global__ void __launch_bounds__(256) gptq_zeros(
    const uint32 *qzeros,  // [groups, n * bits / 32]
    half *zeros,           // [groups, padded_n]
    int n, int padded_n, int bits, int offset, int mask) {
    int column = blockIdx.y * 256 + threadIdx.x, group = blockIdx.x;
    if (column >= padded_n) return;
    int stored = 0;
    if (column < n) {
        const uint32 *word = qzeros + (int64)group * (n * bits / 32) + column * bits / 32;
        int shift = column * bits % 32;
        uint32 value = *word >> shift;
        if (shift + bits > 32) value |= word[1] << (32 - shift);
        stored = value & ((1u << bits) - 1);
    }
    zeros[(int64)group * padded_n + column] = from_float<half>((float)(stored + offset & mask));
}

__global__ void __launch_bounds__(256) pad_columns(
    const half *x,  // [rows, n]
    half *y,        // [rows, padded_n]
    int n, int padded_n) {
    int column = blockIdx.y * 256 + threadIdx.x, row = blockIdx.x;
    if (column >= padded_n) return;
    y[(int64)row * padded_n + column] = column < n ? x[(int64)row * n + column] : half{0};
}
