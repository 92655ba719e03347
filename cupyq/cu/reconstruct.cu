// reconstruct: W[row[j], n] = RN16((code[j, n] - zero[g, n]) * scale[g, n]), then rounded to T
//
// Work split  one warp per 32 x 32 tile, 4 row blocks a thread block.
// Numerics    the difference is exact and the product rounded once to fp16: the bits the formats define. T = bfloat16 rounds
//             that fp16 value once more.
// Limits      columns [first_tile * 32, first_tile * 32 + columns) of the matrix, columns a multiple of 4.
// Traffic     k * columns * (bits / 8 + 2) bytes; a lane writes 4 columns at once.
// Reference   cupyq/formats: dequantize_exl2, dequantize_gptq
#include "tiles.cuh"

template <typename T, bool has_zeros>
__global__ void __launch_bounds__(128) reconstruct(
    const uint32 *tiles,     // [column tiles, words_per_column_tile]
    const half *scales,      // [groups, padded_n]
    const half *zeros,       // [groups, padded_n], null without has_zeros: the zero is 2^(bits - 1)
    const int *block_bits,   // [blocks]
    const int *block_start,  // [blocks]: first word inside a column tile
    const int *block_group,  // [blocks]
    const int *rows,         // [32 * blocks]: stored row -> row of w, -1: none; null: identity
    T *w,                    // [k, columns]
    int first_tile, int columns, int blocks, int padded_n, int words_per_column_tile) {
    int lane = threadIdx.x % 32;
    int block = blockIdx.y * 4 + threadIdx.x / 32;
    if (block >= blocks) return;
    int tile = first_tile + blockIdx.x;
    int column = blockIdx.x * TILE + 4 * (lane / 4);  // of w: the lane's four columns begin here
    const uint32 *source = tiles + (int64)tile * words_per_column_tile + block_start[block];
    int64 group = (int64)block_group[block] * padded_n + tile * TILE + 4 * (lane / 4);
    auto scale = *(const Vector<half, 4> *)(scales + group);

    with_width(block_bits[block], [&](auto width) {
        constexpr int bits = decltype(width)::bits;
        LaneWords<bits> words;
        words.load(source, lane);
        Vector<T, 4> out[8];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float zero = 1 << (bits - 1);
            if constexpr (has_zeros) zero = to_float(zeros[group + c]);
            ZeroPoint<half, bits> point(zero);
            uint32 scale_pair = scale[c].bits | (uint32)scale[c].bits << 16;
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
                uint32 pair = mul_half2(point.values(words, 4 * c + i / 2), scale_pair);
                half low{(uint16)(pair & 0xffff)}, high{(uint16)(pair >> 16)};
                if constexpr (!is_same<T, half>) {
                    out[i][c] = from_float<T>(to_float(low));
                    out[i + 1][c] = from_float<T>(to_float(high));
                } else {
                    out[i][c] = low;
                    out[i + 1][c] = high;
                }
            }
        }
        if (column >= columns) return;
        for (int i = 0; i < 8; i++) {
            int stored = block * TILE + 8 * (lane % 4) + i;
            int row = rows ? rows[stored] : stored;
            if (row >= 0) *(Vector<T, 4> *)(w + (int64)row * columns + column) = out[i];
        }
    });
}
