// reconstruct: W[row[j], n] = RN16((code[j, n] - zero[g, n]) * scale[g, n]), then rounded to T
//
// Work split  one warp per 32 x 32 tile; a thread block has tiles_across neighbours of tiles_down row blocks, so that what its
//             warps write of a row of w is a run of 256 bytes. A lane writes 4 columns of 8 rows, 8 bytes at once.
// Numerics    the difference is exact and the product rounded once to fp16: the bits the formats define. T = bfloat16 rounds
//             that fp16 value once more.
// Limits      columns [first_tile * 32, first_tile * 32 + columns) of the matrix, columns a multiple of 4; row blocks up to
//             tiles_down * 65535.
// Traffic     k * columns * (bits / 8 + 2) bytes, and a scale (and zero) for every group and column.
// Reference   cupyq/formats: dequantize_exl2, dequantize_gptq
#include "tiles.cuh"

constexpr int tiles_across = 4, tiles_down = 2;  // as in ops/reconstruct.py

template <typename T> __device__ __forceinline__ uint32 from_half_pair(uint32 x) {
    if constexpr (is_same<T, half>) return x;
    half low{(uint16)(x & 0xffffu)}, high{(uint16)(x >> 16)};
    return pack_pair<T>(to_float(low), to_float(high));
}

template <typename T, bool has_zeros>
__global__ void __launch_bounds__(32 * tiles_across * tiles_down) reconstruct(
    const uint32 *tiles,     // [column tiles, words_per_column_tile]
    const half *scales,      // [column tiles, groups, 32]
    const half *zeros,       // [column tiles, groups, 32], null without has_zeros: the zero is 2^(bits - 1)
    const int *block_bits,   // [blocks]
    const int *block_start,  // [blocks]: first word inside a column tile
    const int *block_group,  // [blocks]
    const int *rows,         // [32 * blocks]: stored row -> row of W, -1: none; null: identity
    T *w,                    // [k, columns], or [32 * blocks, columns] where is_stored_order
    int first_tile, int columns, int blocks, int groups, int words_per_column_tile, bool is_stored_order,
    bool is_aligned) {  // to 4 values, w and so each of its rows
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int column = (blockIdx.x * tiles_across + warp % tiles_across) * TILE + 4 * (lane / 4);  // of w: the first of four
    int block = blockIdx.y * tiles_down + warp / tiles_across;
    if (block >= blocks || column - 4 * (lane / 4) >= columns) return;
    int tile = first_tile + column / TILE;

    // These loads are under way together; what they give is first needed after the words have been asked for.
    int bits_here = block_bits[block], start = block_start[block];
    int64 group = ((int64)tile * groups + block_group[block]) * TILE + 4 * (lane / 4);
    auto scale = *(const Vector<half, 4> *)(scales + group);
    Vector<half, 4> zero;
    if constexpr (has_zeros) zero = *(const Vector<half, 4> *)(zeros + group);
    int first_row = block * TILE + 2 * (lane % 4);  // stored rows first_row + 8i + e, i < 4, e < 2
    int2 given[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        given[i] =
            rows ? *(const int2 *)(rows + first_row + 8 * i) : make_int2(first_row + 8 * i, first_row + 8 * i + 1);

    uint32 pairs[16];
    with_width(bits_here, [&](auto width) {
        constexpr int bits = decltype(width)::bits;
        LaneWords<bits> words;
        words.load(tiles + (int64)tile * words_per_column_tile + start, lane);
#pragma unroll
        for (int p = 0; p < 16; p++) {
            if constexpr (has_zeros)
                pairs[p] = ZeroPoint<half, bits>(zero[p / 4]).values(words, p);
            else
                pairs[p] = FixedZero<half, bits>::values(words, p);
        }
    });
#pragma unroll
    for (int p = 0; p < 16; p++) pairs[p] = from_half_pair<T>(mul_half2(pairs[p], scale[p / 4].bits * 0x10001u));

    if (column >= columns) return;
    auto store = [&](auto put) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {  // the halves e of pairs i, i + 4, i + 8, i + 12: four columns of one row
                uint32 halves = e ? 0x7632 : 0x5410;
                int row = e ? given[i].y : given[i].x;
                bool is_padding = row < 0;
                if (is_stored_order) row = first_row + 8 * i + e;
                uint32 left = __byte_perm(pairs[i], pairs[i + 4], halves);
                uint32 right = __byte_perm(pairs[i + 8], pairs[i + 12], halves);
                // Rows of padding are zero in stored order, whatever their scale.
                if (is_padding) left = right = 0;
                if (row >= 0) put(w + (int64)row * columns + column, left, right);
            }
    };
    if (is_aligned) {
        store([](T *at, uint32 left, uint32 right) { *(uint2 *)at = make_uint2(left, right); });
    } else {
        store([](T *at, uint32 left, uint32 right) {
            at[0] = T{(uint16)left}, at[1] = T{(uint16)(left >> 16)};
            at[2] = T{(uint16)right}, at[3] = T{(uint16)(right >> 16)};
        });
    }
}
