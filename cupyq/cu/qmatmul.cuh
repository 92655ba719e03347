// The body of qmatmul.cu and qmatmul_grouped.cu: some rows of a product with one matrix, or with several side by side.
//
//            32 columns of one tile                lane 4g + t holds columns 4g .. 4g+3 and rows 16j + 8h + 2t + e
//         g=0        g=1    ...   g=7                mma a (columns 4g+2a, 4g+2a+1), step j (rows 16j .. 16j+15)
//   t=0   [8 rows x 4 columns]                       A registers: pairs of (column, h) = (2a, 0), (2a+1, 0), (2a, 1), (2a+1, 1)
//   t=1   [    "             ]                       B registers: x[m = g][16j + 8h + 2t + e], by ldmatrix
//
// A *step* is 4 blocks, 128 stored rows, of one column tile. Each warp has a ring of shared memory into which it copies, without
// registers and several steps ahead, the words of a step (one run of memory) and the scales and zeros of its groups. No other
// warp reads them, so the ring needs no block-wide barrier and runs on across chunks of x and from one item to the next.
#pragma once
#include "activation.cuh"
#include "matrix.cuh"
#include "tiles.cuh"

static_assert(TILE == 32, "a tile is two 16-row mma operands wide and two k = 16 steps high");

constexpr int STEP = 4;
constexpr int HANDED_STRIDE = 36;  // floats between rows of 32 sums: then the writes of a warp touch all banks

// Two thread blocks share a multiprocessor where that costs no spills: of one kernel, or of this one and the next.
constexpr int blocks_per_sm(bool has_zeros, int widths, int m_tiles, int warps) {
    int most_warps = m_tiles == 1 ? 12 : m_tiles == 2 ? 8 : 0;
    return warps <= most_warps ? 2 : 1;
}
constexpr int slot_bytes(bool has_zeros, int widths) {
    return STEP * (2 * TILE * (has_zeros ? 2 : 1) + widest(widths) * 4 * TILE);
}

// What the matrices' steps look like, in shared memory: for each block, its first word / 32 and, in the high half, its group.
__device__ __forceinline__ void write_block_table(uint32 *table, const Matrix &matrix, int entries, int threads) {
    constexpr int width[6] = {8, 6, 5, 4, 3, 2};
    for (int b = threadIdx.x; b < entries; b += threads) {
        int left = min(b, matrix.blocks), start = 0;
        for (int w = 0; w < 6; w++) {
            int here = min(left, matrix.width_blocks[w]);
            start += here * width[w];
            left -= here;
        }
        table[b] = start | matrix.block_group[min(b, matrix.blocks - 1)] << 16;
    }
}

// How a product is cut; see QmatmulConfig in ops/qmatmul.py. An item is `warps_n` column tiles and one slice of K.
struct Cut {
    int column_tiles;  // of all matrices
    int blocks;        // of each
    int slices, slice_steps, chunk_steps;
    int staged_rows;  // of x: 8 * m_tiles, or fewer with one m tile
};

struct Output {
    void *y;               // [m, y_stride] of T, or float where is_float
    const void *residual;  // as y, or null
    float *partial;        // [slices, m, 32 * column_tiles], unused with one slice
    uint32 *arrived;       // [items / slices]: zero before and after
    int m, y_stride;
    bool is_float;
};

// In place of an activation: no gate. Of a gated product, column tiles alternate between the two matrices.
constexpr int PLAIN = -1;

// `rows` has the number `count` of rows of this thread block, at most cut.staged_rows, and says where the r-th of them lies in x
// (`of_x`) and in y (`of_y`). `before_x` is called once, between the first reads of weights and everything else.
template <
    typename T, bool has_zeros, int widths, int m_tiles, int warps_n, int warps_k, int slots, int gate, typename Rows,
    typename BeforeX>
__device__ __forceinline__ void multiply_rows(
    const T *x,  // [any, x_stride], 16-byte aligned rows of 32 * blocks values
    const Matrix *matrices, int matrix_count, Rows rows, int x_stride, Cut cut, Output out, int first_item,
    int item_step, BeforeX before_x) {
    constexpr int threads = 32 * warps_n * warps_k, slot_size = slot_bytes(has_zeros, widths);
    constexpr int scale_bytes = STEP * 2 * TILE * (has_zeros ? 2 : 1);
    constexpr bool is_gated = gate != PLAIN, is_direct = warps_k == 1 && !is_gated;
    constexpr bool has_one_width = is_one_width(widths);
    extern __shared__ uint4 shared[];
    __shared__ bool is_last;

    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_n = warp % warps_n, warp_k = warp / warps_n;
    int g = lane / 4, t = lane % 4;
    int steps = (cut.blocks + STEP - 1) / STEP, entries = STEP * (steps + 1);
    int groups_of_tiles = (cut.column_tiles + warps_n - 1) / warps_n, items = groups_of_tiles * cut.slices;

    // Shared memory: rings, block tables, rows of x, sums handed over. Rows of x are an odd multiple of 16 bytes apart, so that
    // the 8 rows of an ldmatrix lie in different banks.
    uint32 ring = shared_address(shared) + warp * slots * slot_size;
    uint32 *tables = (uint32 *)((char *)shared + warps_n * warps_k * slots * slot_size);
    uint4 *staged = (uint4 *)(tables + matrix_count * entries);
    int stride = min(cut.chunk_steps, steps) * (STEP * 4) | 1;  // in uint4
    float *handed = (float *)(staged + cut.staged_rows * stride);

    for (int i = 0; i < matrix_count; i++) write_block_table(tables + i * entries, matrices[i], entries, threads);
    __syncthreads();

    auto matrix_of = [&](int tile) {
        if constexpr (is_gated) return tile % 2;
        int i = 0;
        while (i + 1 < matrix_count && tile >= matrices[i + 1].first_tile) i++;
        return i;
    };
    auto own_tile = [&](int tile, int i) { return is_gated ? tile / 2 : tile - matrices[i].first_tile; };

    // The part of the chunk that begins at step `chunk` of an item's slice which belongs to the warps of this warp_k: a run of
    // steps, or of a mixture every warps_k-th step, so that its wider blocks are everybody's. It lies at the same place of every
    // chunk, however short, so that these warps stage their part of x without waiting for others.
    constexpr int step_stride = has_one_width ? 1 : warps_k;
    int share = (cut.chunk_steps + warps_k - 1) / warps_k;
    auto share_of = [&](int item, int chunk, int &step, int &end) {
        int slice = item / groups_of_tiles;
        int chunk_end = min(min(chunk + cut.chunk_steps, (slice + 1) * cut.slice_steps), steps);
        step = min(chunk + warp_k * (has_one_width ? share : 1), chunk_end);
        end = has_one_width ? min(step + share, chunk_end) : chunk_end;
    };
    auto has_tile = [&](int item) { return item % groups_of_tiles * warps_n + warp_n < cut.column_tiles; };
    auto meet = [&] {  // of the warps that read the same part of x
        if constexpr (warps_n == 1)
            __syncwarp();
        else if constexpr (warps_k == 1)
            __syncthreads();
        else
            asm volatile("bar.sync %0, %1;" ::"r"(1 + warp_k), "n"(32 * warps_n) : "memory");
    };

    // --- reading ahead ---
    struct Ahead {
        int item, chunk, step, end;
        const char *words, *scales;
        const uint32 *table;
    } ahead = {first_item};
    auto begin_item = [&] {
        if (ahead.item >= items) return;
        ahead.chunk = ahead.item / groups_of_tiles * cut.slice_steps;
        share_of(ahead.item, ahead.chunk, ahead.step, ahead.end);
        if (!has_tile(ahead.item)) ahead.chunk = steps, ahead.end = ahead.step;
        int tile = min(ahead.item % groups_of_tiles * warps_n + warp_n, cut.column_tiles - 1);
        int i = matrix_of(tile), own = own_tile(tile, i);
        const Matrix &matrix = matrices[i];
        // Each lane points to its own 16 bytes: of the words, and of the scales (lanes 0 to 15) or zeros of up to 4 groups.
        ahead.words = (const char *)(matrix.tiles + (int64)own * matrix.words_per_column_tile) + lane * 16;
        int64 first_scale = (int64)own * matrix.groups * TILE + lane % 16 * 8;
        ahead.scales = (const char *)((has_zeros && lane >= 16 ? matrix.zeros : matrix.scales) + first_scale);
        ahead.table = tables + i * entries;
    };
    auto read_ahead = [&](uint32 slot) {  // the shared address of its 16 bytes for this lane
        while (ahead.item < items && ahead.step >= ahead.end) {
            int slice = ahead.item / groups_of_tiles;
            ahead.chunk += cut.chunk_steps;
            if (ahead.chunk < min((slice + 1) * cut.slice_steps, steps)) {
                share_of(ahead.item, ahead.chunk, ahead.step, ahead.end);
            } else {
                ahead.item += item_step;
                begin_item();
            }
        }
        if (ahead.item < items) {
            const uint32 *entry = ahead.table + STEP * ahead.step;
            int first_group = entry[0] >> 16, last_group = entry[STEP - 1] >> 16;
            if ((has_zeros || lane < 16) && lane / 4 % 4 <= last_group - first_group)
                copy_async_16(slot, ahead.scales + first_group * (2 * TILE));
            constexpr int full = STEP * 8 * widest(widths);  // 16-byte vectors of a step of the widest blocks
            int start = has_one_width ? STEP * widest(widths) * ahead.step : entry[0] & 0xffff;
            int vectors = full;
            if (!has_one_width || STEP * (ahead.step + 1) > cut.blocks) vectors = ((entry[STEP] & 0xffff) - start) * 8;
            const char *source = ahead.words + (int64)start * 128;
            uint32 words = slot + scale_bytes;
            if (vectors == full) {
#pragma unroll
                for (int v = 0; v < full / 32; v++) copy_async_16(words + v * 512, source + v * 512);
            } else {
#pragma unroll
                for (int v = 0; v < full / 32; v++)
                    if (32 * v + lane < vectors) copy_async_16(words + v * 512, source + v * 512);
            }
            ahead.step += step_stride;
        }
        copy_async_commit();  // one group a slot, empty or not: the waits below count them
    };
    begin_item();
#pragma unroll 1
    for (int s = 0; s < slots; s++) read_ahead(ring + lane * 16 + s * slot_size);

    before_x();

    // --- one step ---
    // With many rows registers are scarce: products are then scaled block by block, as they come, and not once a group.
    constexpr bool scales_blocks = m_tiles >= 8;
    float sums[m_tiles][2][4], of_group[scales_blocks ? 1 : m_tiles][2][4];  // [m tile][mma a][accumulator register]
    // Shared address of what this lane points ldmatrix to, and how far the next 8 rows are. Rows beyond count fill columns of the
    // result that nobody stores: any row will do for them.
    int r = lane % 8, x_tile = 8 * stride * 16;
    uint32 x_lane = shared_address(staged + (m_tiles > 1 || r < rows.count ? r : 0) * stride + lane / 8);

    struct Block {
        const uint32 *words;
        const half *scales;
        uint32 x;  // added to x_lane
    };
    auto multiply_block = [&](auto width, Block block) {
        constexpr int bits = decltype(width)::bits;
        LaneWords<bits> own;
        own.load_shared(block.words, lane);
        uint32 A[2][2][4];  // [mma a][step j][register]
        [[maybe_unused]] const Vector<half, 4> &zero =
            *(const Vector<half, 4> *)(block.scales + (has_zeros ? STEP * TILE : 0));
        [[maybe_unused]] float factor[4];
        if constexpr (scales_blocks) {
            Vector<half, 4> scale = *(const Vector<half, 4> *)block.scales;
            for (int c = 0; c < 4; c++) factor[c] = to_float(scale[c]);
        }
#pragma unroll
        for (int c = 0; c < 4; c++) {
            auto decode = [&](auto point) {
#pragma unroll
                for (int p = 0; p < 4; p++) A[c / 2][p / 2][c % 2 + p % 2 * 2] = point.values(own, 4 * c + p);
            };
            if constexpr (has_zeros)
                decode(ZeroPoint<T, bits>(zero[c]));
            else
                decode(FixedZero<T, bits>());
        }
#pragma unroll
        for (int i = 0; i < m_tiles; i++) {
            uint32 xs[4];
            ldmatrix_x4(xs, x_lane + i * x_tile + block.x);
            uint32 b[2][2] = {{xs[0], xs[1]}, {xs[2], xs[3]}};
#pragma unroll
            for (int a = 0; a < 2; a++) {
                if constexpr (scales_blocks) {
                    float d[4] = {};
                    mma_16x8x16<T>(d, A[a][0], b[0]);
                    mma_16x8x16<T>(d, A[a][1], b[1]);
                    for (int e = 0; e < 4; e++) sums[i][a][e] = fmaf(d[e], factor[2 * a + e / 2], sums[i][a][e]);
                } else {
                    mma_16x8x16<T>(of_group[i][a], A[a][0], b[0]);
                    mma_16x8x16<T>(of_group[i][a], A[a][1], b[1]);
                }
            }
        }
    };
    auto begin_group = [&] {
#pragma unroll
        for (int i = 0; i < (scales_blocks ? 0 : m_tiles); i++)
            for (int a = 0; a < 2; a++)
                for (int e = 0; e < 4; e++) of_group[i][a][e] = 0;
    };
    auto end_group = [&](const half *scales) {
        Vector<half, 4> scale = *(const Vector<half, 4> *)scales;
        float factor[4];
        for (int c = 0; c < 4; c++) factor[c] = to_float(scale[c]);
#pragma unroll
        for (int i = 0; i < (scales_blocks ? 0 : m_tiles); i++)
            for (int a = 0; a < 2; a++)
                for (int e = 0; e < 4; e++)
                    sums[i][a][e] = fmaf(of_group[i][a][e], factor[2 * a + e / 2], sums[i][a][e]);
    };
    // Blocks of a step beyond the last of the matrix meet zeros of x.
    auto multiply_step = [&](int slot, const uint32 *table, int step, int chunk) {
        const char *at = (const char *)shared + warp * slots * slot_size + slot * slot_size;
        Block block = {
            (const uint32 *)(at + scale_bytes), (const half *)at + 4 * g, uint32(step - chunk) * (STEP * 2 * TILE)};
        const uint32 *entry = table + STEP * step;
        uint32 first = entry[0], last = entry[STEP - 1];
        auto of_own_group = [&](auto width, uint32 here) {
            Block own = block;
            own.scales += ((here >> 16) - (first >> 16)) * TILE;
            begin_group();
            multiply_block(width, own);
            end_group(own.scales);
            block.words += decltype(width)::bits * TILE;
            block.x += 2 * TILE;
        };
        uint32 bits = (entry[1] - first) & 0xffff;
        if (has_one_width || bits == ((entry[STEP] - last) & 0xffff)) {
            auto multiply_all = [&](auto width) {
                if (first >> 16 == last >> 16) {
                    begin_group();
#pragma unroll(m_tiles <= 2 ? STEP : 1)
                    for (int s = 0; s < STEP; s++) {
                        multiply_block(width, block);
                        block.words += decltype(width)::bits * TILE;
                        block.x += 2 * TILE;
                    }
                    end_group(block.scales);
                } else {
#pragma unroll(m_tiles <= 2 ? 2 : 1)
                    for (int s = 0; s < STEP; s++) of_own_group(width, entry[s]);
                }
            };
            if constexpr (has_one_width)
                multiply_all(constant<widest(widths)>());
            else
                with_width(bits, [&](auto width) {
                    if constexpr (widths >> decltype(width)::bits & 1) multiply_all(width);
                });
        } else if constexpr (!has_one_width) {  // the few steps where the width changes
#pragma unroll 1
            for (int s = 0; s < STEP; s++)
                with_width((entry[s + 1] - entry[s]) & 0xffff, [&](auto width) {
                    if constexpr (widths >> decltype(width)::bits & 1) of_own_group(width, entry[s]);
                });
        }
    };

    // --- results ---
    auto finish = [&](int r, int tile, int c, Vector<float, 4> v, Vector<float, 4> up) {  // four columns of one row
        int i = matrix_of(tile), column = own_tile(tile, i) * TILE + c;
        const Matrix &matrix = matrices[i];
        if (column >= matrix.n) return;
        int64 at = (int64)rows.of_y(r) * out.y_stride + matrix.first_column + column;
        for (int e = 0; e < 4; e++) {
            if (matrix.bias) v[e] += matrix.bias[column + e];
            if constexpr (is_gated) {
                if (matrices[1].bias) up[e] += matrices[1].bias[column + e];
                v[e] = activation<gate>(v[e]) * up[e];
            }
            if (out.is_float) {
                if (out.residual) v[e] += ((const float *)out.residual)[at + e];
                ((float *)out.y)[at + e] = v[e];
            } else {
                if (out.residual) v[e] += to_float(((const T *)out.residual)[at + e]);
                ((T *)out.y)[at + e] = from_float<T>(v[e]);
            }
        }
    };
    int padded_n = cut.column_tiles * TILE;
    auto partial_at = [&](int slice, int r, int tile, int c) {
        return (float4 *)(out.partial + ((int64)slice * out.m + rows.of_y(r)) * padded_n + tile * TILE + c);
    };
    // Calls f(row, tile, column) for the vectors of four columns this thread finishes; of a gated product, those of the gate.
    auto each_vector = [&](int first_tile, auto f) {
        constexpr int tile_step = is_gated ? 2 : 1;
        for (int i = threadIdx.x; i < warps_n / tile_step * rows.count * (TILE / 4); i += threads) {
            int c = i % (TILE / 4) * 4, r = i / (TILE / 4) % rows.count, n = i / (TILE / 4) / rows.count * tile_step;
            if (first_tile + n < cut.column_tiles) f(r, n, c);
        }
    };

    int slot = 0, staged_chunk = -1;
    for (int item = first_item; item < items; item += item_step) {
        int slice = item / groups_of_tiles, first_tile = item % groups_of_tiles * warps_n;
        int tile = min(first_tile + warp_n, cut.column_tiles - 1);
        const uint32 *table = tables + matrix_of(tile) * entries;
#pragma unroll
        for (int i = 0; i < m_tiles; i++)
            for (int a = 0; a < 2; a++)
                for (int e = 0; e < 4; e++) sums[i][a][e] = 0;

        int slice_end = min((slice + 1) * cut.slice_steps, steps);
        for (int chunk = slice * cut.slice_steps; chunk < slice_end; chunk += cut.chunk_steps) {
            int step, end;
            share_of(item, chunk, step, end);
            if (chunk != staged_chunk) {
                if (staged_chunk >= 0) meet();
                constexpr int of_step = STEP * TILE / 8;  // 16-byte vectors of a row; zeros beyond the last block
                int vectors = (end - step + step_stride - 1) / step_stride * of_step;
                for (int i = 32 * warp_n + lane; i < rows.count * vectors; i += 32 * warps_n) {
                    int r = i / vectors, j = i % vectors,
                        c = (step + j / of_step * step_stride) * of_step + j % of_step;
                    bool is_valid = c < cut.blocks * (TILE / 8);
                    const T *source = x + (is_valid ? (int64)rows.of_x(r) * x_stride + c * 8 : 0);
                    copy_async_16(staged + r * stride + c - chunk * of_step, source, is_valid);
                }
                copy_async_commit();
                copy_async_wait<0>();
                meet();
                staged_chunk = chunk;
            }
            if (!has_tile(item)) end = step;
            for (; step < end; step += step_stride) {
                copy_async_wait<slots - 1>();
                __syncwarp();
                multiply_step(slot, table, step, chunk);
                __syncwarp();
                read_ahead(ring + lane * 16 + slot * slot_size);
                slot = slot + 1 == slots ? 0 : slot + 1;
            }
        }

        if constexpr (is_direct) {
            if (first_tile + warp_n < cut.column_tiles) {
#pragma unroll
                for (int i = 0; i < m_tiles; i++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        int r = 8 * i + 2 * t + e;
                        if (r >= rows.count) continue;
                        Vector<float, 4> v = {sums[i][0][e], sums[i][0][2 + e], sums[i][1][e], sums[i][1][2 + e]};
                        if (cut.slices == 1)
                            finish(r, tile, 4 * g, v, v);
                        else
                            *partial_at(slice, r, tile, 4 * g) = make_float4(v[0], v[1], v[2], v[3]);
                    }
            }
        } else {  // the warps' shares of K are added in order
            float *own = handed + warp * cut.staged_rows * HANDED_STRIDE + 4 * g;
#pragma unroll
            for (int i = 0; i < m_tiles; i++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int r = 8 * i + 2 * t + e;
                    if (r < rows.count)
                        *(float4 *)(own + r * HANDED_STRIDE) =
                            make_float4(sums[i][0][e], sums[i][0][2 + e], sums[i][1][e], sums[i][1][2 + e]);
                }
            __syncthreads();
            each_vector(first_tile, [&](int r, int n, int c) {
                auto total = [&](int n) {
                    Vector<float, 4> v = {};
#pragma unroll
                    for (int k = 0; k < warps_k; k++) {
                        float4 w =
                            *(const float4 *)(handed + ((k * warps_n + n) * cut.staged_rows + r) * HANDED_STRIDE + c);
                        v[0] += w.x, v[1] += w.y, v[2] += w.z, v[3] += w.w;
                    }
                    return v;
                };
                Vector<float, 4> v = total(n), up = v;
                if constexpr (is_gated) up = total(n + 1);
                if (cut.slices == 1) {
                    finish(r, first_tile + n, c, v, up);
                } else {
                    *partial_at(slice, r, first_tile + n, c) = make_float4(v[0], v[1], v[2], v[3]);
                    if constexpr (is_gated)
                        *partial_at(slice, r, first_tile + n + 1, c) = make_float4(up[0], up[1], up[2], up[3]);
                }
            });
            if (cut.slices == 1 && item + item_step < items) __syncthreads();  // before sums are handed over anew
        }

        if (cut.slices > 1) {  // the last slice to arrive adds all of them, in slice order
            uint32 *arrived = out.arrived + item % groups_of_tiles;
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) is_last = atomicAdd(arrived, 1u) == cut.slices - 1;
            __syncthreads();
            if (is_last) {
                __threadfence();
                each_vector(first_tile, [&](int r, int n, int c) {
                    auto total = [&](int n) {
                        Vector<float, 4> v = {};
                        for (int s = 0; s < cut.slices; s++) {
                            float4 w = __ldcg(partial_at(s, r, first_tile + n, c));
                            v[0] += w.x, v[1] += w.y, v[2] += w.z, v[3] += w.w;
                        }
                        return v;
                    };
                    Vector<float, 4> v = total(n), up = v;
                    if constexpr (is_gated) up = total(n + 1);
                    finish(r, first_tile + n, c, v, up);
                });
                if (threadIdx.x == 0) *arrived = 0;
            }
            __syncthreads();  // is_last has been read
        }
    }
}
