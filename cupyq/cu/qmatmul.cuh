// The body of qmatmul.cu and qmatmul_grouped.cu: some rows of a product with one matrix, for 32 * warps_n of its columns and
// one K slice (blockIdx.y). Formula, work split and numerics: qmatmul.cu.
//
//            32 columns of one tile                     lane 4g + t holds columns 4g..4g+3 and rows 8t..8t+7:
//         g=0        g=1    ...   g=7                      mma a (columns 4g+2a, 4g+2a+1), step j (rows 8t+4j..8t+4j+3)
//   t=0   [8 rows x 4 columns]                             A register 0: column 4g+2a,   rows +0, +1
//   t=1   [    "             ]                                        1: column 4g+2a+1, rows +0, +1
//   t=2                                                               2, 3: the same columns, rows +2, +3
//   t=3                                                    B registers: x[m = g][8t+4j .. +3], two words of one 16-byte load
#pragma once
#include "matrix.cuh"
#include "tiles.cuh"

static_assert(TILE == 32, "a tile is two 16-row mma operands wide and two k = 16 steps high");

// How many widths a matrix mixes. More of them, and more rows, leave the compiler fewer registers.
constexpr int width_count(int widths) {
    int count = 0;
    for (int bits = 2; bits <= 8; bits++) count += widths >> bits & 1;
    return count;
}

// Two thread blocks share a multiprocessor where that costs no spills.
constexpr int blocks_per_sm(int widths, int m_tiles) {
    return m_tiles == 1 && width_count(widths) <= 3 || m_tiles == 2 && width_count(widths) <= 2 ? 2 : 1;
}

// `Rows` has the number `count` of rows of this thread block, at most 8 * m_tiles, and says where the r-th of them lies in x
// (`of_x`) and in y (`of_y`).
template <typename T, bool has_zeros, int widths, int m_tiles, int warps_n, int warps_k, typename Rows>
__device__ __forceinline__ void multiply_rows(
    const T *x,            // [any, x_stride], x_stride at least 32 * matrix.blocks
    const Matrix &matrix,  // its widths are among `widths`
    void *y,               // [m, n] of T, or float where y_is_float
    float *partial,        // [slices, m, padded_n], unused with one slice
    uint32 *arrived,       // counter of these rows and columns: zero before and after
    Rows rows, int x_stride, int m, int n, int padded_n, int column_block, int slice_blocks, int chunk_blocks,
    bool y_is_float) {
    constexpr int threads = 32 * warps_n * warps_k, m_block = 8 * m_tiles;
    extern __shared__ uint4 shared[];
    __shared__ bool is_last;

    int lane = threadIdx.x % 32, warp_n = threadIdx.x / 32 % warps_n, warp_k = threadIdx.x / 32 / warps_n;
    int g = lane / 4, t = lane % 4;
    int tile = column_block * warps_n + warp_n;
    int tile_column = tile * TILE + 4 * g;  // the lane's first column
    bool has_tile = tile * TILE < padded_n;
    const uint32 *tile_words = matrix.tiles + (int64)tile * matrix.words_per_column_tile;

    int slice_begin = blockIdx.y * slice_blocks, slice_end = min(slice_begin + slice_blocks, matrix.blocks);
    // Shared rows are an odd multiple of 64 bytes apart, so the 16-byte reads of 8 lanes (2 rows x 4) touch all 32 banks.
    int stride = (chunk_blocks | 1) * 4;  // in uint4

    float sums[m_tiles][2][4] = {};  // [m tile][mma a][accumulator register]

    auto stage_x = [&](int begin, int end) {
        int count = (end - begin) * (TILE / 8);  // 16-byte vectors of a row
        for (int i = threadIdx.x; i < m_block * count; i += threads) {
            int r = i / count, c = i % count;
            bool is_valid = r < rows.count;
            const T *source = x + (int64)(is_valid ? rows.of_x(r) : 0) * x_stride + begin * TILE + c * 8;
            copy_async_16(&shared[r * stride + c], source, is_valid);
        }
        copy_async_commit();
        copy_async_wait<0>();
    };

    // Blocks [begin, end) of one width; `base`: words of the width's first block, `first`: its number; `chunk`: that of sX.
    auto run = [&](auto width, int begin, int end, int first, const uint32 *base, int chunk) {
        constexpr int bits = decltype(width)::bits;
        constexpr int stages = m_tiles > 4 ? (width_count(widths) > 3 ? 1 : 2) : bits <= 4 ? 4 : 3;
        struct Stage {
            LaneWords<bits> words;
            Vector<half, 4> scale, zero;
        } stage[stages];
        auto load = [&](Stage &s, int block) {
            s.words.load(base + (int64)(block - first) * (bits * TILE), lane);
            int64 group = (int64)matrix.block_group[block] * padded_n + tile_column;
            s.scale = *(const Vector<half, 4> *)(matrix.scales + group);
            if constexpr (has_zeros) s.zero = *(const Vector<half, 4> *)(matrix.zeros + group);
        };
        auto multiply = [&](const Stage &s, int block) {
            uint32 a[2][2][4];  // [mma a][step j][register]
#pragma unroll
            for (int c = 0; c < 4; c++) {
                float zero = 1 << (bits - 1);
                if constexpr (has_zeros) zero = to_float(s.zero[c]);
                ZeroPoint<T, bits> point(zero);
#pragma unroll
                for (int p = 0; p < 4; p++) a[c / 2][p / 2][c % 2 + p % 2 * 2] = point.values(s.words, 4 * c + p);
            }
            float scale[4];
            for (int c = 0; c < 4; c++) scale[c] = to_float(s.scale[c]);
#pragma unroll
            for (int i = 0; i < m_tiles; i++) {
                uint4 xs = shared[(8 * i + g) * stride + (block - chunk) * 4 + t];
                uint32 b[2][2] = {{xs.x, xs.y}, {xs.z, xs.w}};
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float d[4] = {};
                    mma_16x8x16<T>(d, a[h][0], b[0]);
                    mma_16x8x16<T>(d, a[h][1], b[1]);
                    for (int e = 0; e < 4; e++) sums[i][h][e] = fmaf(d[e], scale[2 * h + e / 2], sums[i][h][e]);
                }
            }
        };
#pragma unroll
        for (int s = 0; s < stages; s++)
            if (begin + s < end) load(stage[s], begin + s);
        for (int block = begin; block < end; block += stages) {
#pragma unroll
            for (int s = 0; s < stages; s++) {
                if (block + s >= end) break;
                multiply(stage[s], block + s);
                if (block + s + stages < end) load(stage[s], block + s + stages);
            }
        }
    };

    for (int chunk = slice_begin; chunk < slice_end; chunk += chunk_blocks) {
        int chunk_end = min(chunk + chunk_blocks, slice_end);
        if (chunk != slice_begin) __syncthreads();
        stage_x(chunk, chunk_end);
        __syncthreads();
        if (has_tile) {
            int share = (chunk_end - chunk + warps_k - 1) / warps_k;
            int begin = chunk + warp_k * share, end = min(begin + share, chunk_end);
            int first = 0;
            const uint32 *base = tile_words;
            auto run_width = [&](auto width, int count) {
                constexpr int bits = decltype(width)::bits;
                if constexpr (widths >> bits & 1) {
                    int from = max(begin, first), to = min(end, first + count);
                    if (from < to) run(width, from, to, first, base, chunk);
                    first += count;
                    base += (int64)count * (bits * TILE);
                }
            };
            run_width(constant<8>(), matrix.width_blocks[0]);
            run_width(constant<6>(), matrix.width_blocks[1]);
            run_width(constant<5>(), matrix.width_blocks[2]);
            run_width(constant<4>(), matrix.width_blocks[3]);
            run_width(constant<3>(), matrix.width_blocks[4]);
            run_width(constant<2>(), matrix.width_blocks[5]);
        }
    }

    // K shares of this block: warps with warp_k > 0 hand their sums over; warp_k = 0 adds them in order.
    if constexpr (warps_k > 1) {
        float *handed = (float *)shared;
        constexpr int values = m_tiles * 8;
        __syncthreads();
        if (warp_k > 0)
            for (int i = 0; i < values; i++)
                handed[(((warp_k - 1) * values + i) * warps_n + warp_n) * 32 + lane] = sums[i / 8][i / 4 % 2][i % 4];
        __syncthreads();
        if (warp_k == 0)
            for (int w = 0; w < warps_k - 1; w++)
#pragma unroll
                for (int i = 0; i < values; i++)
                    sums[i / 8][i / 4 % 2][i % 4] += handed[((w * values + i) * warps_n + warp_n) * 32 + lane];
    }

    auto store = [&](int row, int column, Vector<float, 4> v) {  // four columns of one row, with bias, rounded
        for (int c = 0; c < 4; c++)
            if (matrix.bias) v[c] += matrix.bias[column + c];
        int64 at = (int64)row * n + column;
        if (y_is_float) {
            for (int c = 0; c < 4; c++) ((float *)y)[at + c] = v[c];
        } else {
            for (int c = 0; c < 4; c++) ((T *)y)[at + c] = from_float<T>(v[c]);
        }
    };

    if (warp_k == 0 && has_tile && tile_column < n) {
#pragma unroll
        for (int i = 0; i < m_tiles; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int r = 8 * i + 2 * t + e;
                if (r >= rows.count) continue;
                int row = rows.of_y(r);
                Vector<float, 4> v = {sums[i][0][e], sums[i][0][2 + e], sums[i][1][e], sums[i][1][2 + e]};
                if (gridDim.y == 1)
                    store(row, tile_column, v);
                else
                    *(Vector<float, 4> *)(partial + ((int64)blockIdx.y * m + row) * padded_n + tile_column) = v;
            }
    }
    if (gridDim.y == 1) return;

    // The last slice to arrive adds all of them, in slice order.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(arrived, 1u) == gridDim.y - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    int columns_here = min(warps_n * TILE, n - column_block * warps_n * TILE);
    for (int i = threadIdx.x; i < rows.count * (columns_here / 4); i += threads) {
        int row = rows.of_y(i / (columns_here / 4)),
            column = column_block * warps_n * TILE + i % (columns_here / 4) * 4;
        Vector<float, 4> total = {};
        for (int slice = 0; slice < gridDim.y; slice++) {
            float4 v = __ldcg((const float4 *)(partial + ((int64)slice * m + row) * padded_n + column));
            total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
        }
        store(row, column, total);
    }
    if (threadIdx.x == 0) *arrived = 0;
}
