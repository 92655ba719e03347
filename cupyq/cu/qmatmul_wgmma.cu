// qmatmul_wgmma: y[m, n] = sum_j x[m, j] * RN16((code[j, n] - zero[g, n]) * scale[g, n]) + bias[n] + residual[m, n]
//                g = group of stored row j; for several matrices side by side, each with columns of y of its own
//
// For many rows, on Hopper. An *item* is `rows` rows and 128 * warpgroups_n columns of y; a *stage* is 64 stored rows of W.
//
// Work split  a thread block has two warpgroups that multiply and one that copies: a ring of stages in shared memory, an image of
//             x (from arrange_rows.cu) and the words, scales and zeros of two row blocks each.
//             y^T = W^T x^T by wgmma: weights are decoded into the registers of its first operand, a block at a time,
//             while the products of the block before run; a warp has one column tile. The two warpgroups take 128
//             columns each (warpgroups_n = 2), or every other stage of the same 128.
//             Thread block b takes items b, b + gridDim.x, ... whole, `waves` of them; the stages of the items that are left are
//             one long run, of which it takes `run_stages`, so that all thread blocks end at about the same time.
// Numerics    weights are rounded as the format defines them (then to bfloat16 where T is); fp32 sums. The parts of an item
//             that several thread blocks share are added in the order of K by whichever of them arrives last: the same bits on
//             every run. One rounding at the store.
// Limits      sm_90a. Any m; n, y_stride and the first columns multiples of 4, x, y and residual 16-byte aligned; blocks of mixed width in falling order; all matrices with as many blocks in one row order.
// Traffic     weight bytes + scales + m * (k + n) * sizeof(T); of L2, per item: 128 bytes of x a row and stage, and its weights.
// Reference   cupyq/ops/qmatmul.py: qmatmul_reference
#include "matrix.cuh"
#include "tiles.cuh"
#include "wgmma.cuh"

#ifndef EVERY_LANE_ARRIVES  // where a slot is given back; racecheck sees no order among lanes (tools/sanitize.py)
#define EVERY_LANE_ARRIVES 0
#endif

constexpr int STAGE_BLOCKS = 2, THREADS = 384;
constexpr int IMAGE_ROW_BYTES = 128;  // a row's values of a stage
static_assert(STAGE_BLOCKS * TILE * 2 == IMAGE_ROW_BYTES, "a stage is one swizzled row of x wide");

// What a thread block does next: stages begin .. end - 1 of an item that `parts` thread blocks, `first` and after, share.
struct Segment {
    int item, begin, end, first, parts;
};
struct Schedule {
    int stages, whole, whole_end, run_stages, run, run_end;

    __device__ __forceinline__ Schedule(int items, int stages, int waves, int run_stages)
        : stages(stages), whole(blockIdx.x), whole_end(waves * gridDim.x), run_stages(run_stages) {
        run = blockIdx.x * run_stages;
        run_end = min(run + run_stages, (items - whole_end) * stages);
    }
    __device__ __forceinline__ bool next(Segment &s) {
        if (whole < whole_end) {
            s = {whole, 0, stages, (int)blockIdx.x, 1};
            whole += gridDim.x;
            return true;
        }
        if (run >= run_end) return false;
        int shared = run / stages, begin = run - shared * stages, end = min(stages, begin + run_end - run);
        int first = shared * stages / run_stages, last = ((shared + 1) * stages - 1) / run_stages;
        s = {whole_end + shared, begin, end, first, last - first + 1};
        run += end - begin;
        return true;
    }
};

// Where in the ring one is, and the parity of the barriers there.
struct Cursor {
    int slot;
    uint32 parity;
    __device__ __forceinline__ void advance(int by, int ring) {
        slot += by;
        while (slot >= ring) slot -= ring, parity ^= 1;
    }
};

// A stage of a column tile, in shared memory for every matrix. An odd last block stands in for the one after it, where x is 0.
struct alignas(16) Stage {
    uint32 start;      // first word / 32
    uint32 group;      // of the first block
    uint32 bytes;      // of words
    uint32 of_blocks;  // bits of the first, of the second << 4, groups between << 8, offset of the second / 128 << 16
    __device__ __forceinline__ int bits(int b) const { return of_blocks >> 4 * b & 15; }
    __device__ __forceinline__ uint32 groups_between() const { return of_blocks >> 8 & 1; }
    __device__ __forceinline__ uint32 second_offset() const { return of_blocks >> 16; }
};

__device__ __forceinline__ void write_stages(Stage *table, const Matrix &matrix, int stages) {
    constexpr int width[6] = {8, 6, 5, 4, 3, 2};
    for (int s = threadIdx.x; s < stages; s += THREADS) {
        int block[2] = {2 * s, min(2 * s + 1, matrix.blocks - 1)}, start[2], bits[2];
        for (int b = 0; b < 2; b++) {
            int left = block[b];
            start[b] = bits[b] = 0;
            for (int w = 0; w < 6; w++) {
                int here = min(left, matrix.width_blocks[w]);
                start[b] += here * width[w];
                if (bits[b] == 0 && left < matrix.width_blocks[w]) bits[b] = width[w];
                left -= here;
            }
        }
        uint32 group = matrix.block_group[block[0]], between = matrix.block_group[block[1]] - group;
        uint32 offset = start[1] - start[0];
        table[s] = {(uint32)start[0], group, (offset + bits[1]) * 128,
            (uint32)bits[0] | (uint32)bits[1] << 4 | between << 8 | offset << 16};
    }
}

// fp16 pair to bfloat16 pair.
__device__ __forceinline__ uint32 half2_to_bfloat162(uint32 x) {
    uint32 y;
    float low = to_float(half{(uint16)(x & 0xffffu)}), high = to_float(half{(uint16)(x >> 16)});
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// What a lane needs of one block: its words, and the scales (and zeros) of its four columns.
template <int bits, bool has_zeros> struct Block {
    LaneWords<bits> words;
    uint2 scale, zero;

    // From shared memory: the block's words, and its group's scales with the zeros `zeros_after` bytes behind them.
    __device__ __forceinline__ void load(uint32 words_at, uint32 scales_at, int zeros_after, int lane) {
        constexpr int part = bits >= 4 ? 4 : 2;  // words of the first part (formats/tiles.py); the others follow
        uint32 rest_at = words_at + part * 128;
        if constexpr (part == 4) {
            uint4 v = load_shared_16(words_at + lane * 16);
            words.word[0] = v.x, words.word[1] = v.y, words.word[2] = v.z, words.word[3] = v.w;
        } else {
            uint2 v = load_shared_8(words_at + lane * 8);
            words.word[0] = v.x, words.word[1] = v.y;
        }
        if constexpr (bits - part == 1) words.word[part] = load_shared_4(rest_at + lane * 4);
        if constexpr (bits - part == 2) {
            uint2 v = load_shared_8(rest_at + lane * 8);
            words.word[part] = v.x, words.word[part + 1] = v.y;
        }
        if constexpr (bits - part == 4) {
            uint4 v = load_shared_16(rest_at + lane * 16);
            words.word[4] = v.x, words.word[5] = v.y, words.word[6] = v.z, words.word[7] = v.w;
        }
        scale = load_shared_8(scales_at + lane / 4 * 8);
        if constexpr (has_zeros) zero = load_shared_8(scales_at + zeros_after + lane / 4 * 8);
    }
};

// The weights of columns 4g .. 4g+3 of the tile, as registers of the first operand of wgmma: [a][step][register], a for columns
// 4g + 2a and 4g + 2a + 1, step j for rows 16j .. 16j+15 of the block.
template <typename T, bool has_zeros, int bits>
__device__ __forceinline__ void decode_block(uint32 (&A)[2][2][4], const Block<bits, has_zeros> &block) {
#pragma unroll
    for (int c = 0; c < 4; c++) {
        int a = c / 2, i = c % 2;
        uint32 scales = a ? block.scale.y : block.scale.x, zeros = a ? block.zero.y : block.zero.x;
        uint32 factor = i ? both_high(scales) : both_low(scales);
        auto decode = [&](auto point) {
#pragma unroll
            for (int p = 0; p < 4; p++) {
                uint32 weight = mul_half2(point.values(block.words, 4 * c + p), factor);
                A[a][p / 2][i + p % 2 * 2] = is_same<T, half> ? weight : half2_to_bfloat162(weight);
            }
        };
        if constexpr (has_zeros)
            decode(ZeroPoint<half, bits>(half{(uint16)(i ? zeros >> 16 : zeros)}));
        else
            decode(FixedZero<half, bits>());
    }
}

template <typename T, bool has_zeros, int widths, int rows, int warpgroups_n>
__global__ void __launch_bounds__(THREADS, 1) qmatmul_wgmma(
    const __grid_constant__ Matrices matrices,  // their widths are among `widths`
    const uint8 *x,                             // images of it
    void *y,                                    // [m, y_stride] of T, or float where y_is_float
    const void *residual,                       // as y, or null
    float *partial,   // [2 * gridDim.x, 128 * warpgroups_n, rows], unused where no item is shared
    uint32 *arrived,  // [2 * shared items]: zero before and after
    int matrix_count, int blocks, int row_blocks, int items, int waves, int run_stages, int ring, int m, int y_stride,
    bool y_is_float) {
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
    __trap();
#else
    constexpr int MAX_RING = 16, COPIERS = 3;
    constexpr int tiles_here = 4 * warpgroups_n, warpgroups_k = 2 / warpgroups_n;
    constexpr int image_bytes = rows * IMAGE_ROW_BYTES, words_bytes = STAGE_BLOCKS * widest(widths) * 128;
    constexpr int scales_bytes = STAGE_BLOCKS * TILE * 2, tables = has_zeros ? 2 : 1;
    constexpr int vectors = rows / 4 / warpgroups_k;  // of four columns, that a thread finishes
    extern __shared__ uint4 shared[];
    __shared__ uint64 full[MAX_RING], empty[MAX_RING];
    __shared__ bool is_second[2], is_last[2];

    // Shared memory: images from a multiple of 1024 bytes on, words, scales (and zeros) of each slot, tables of stages, sums
    // that one warpgroup hands to the other.
    int stages = (blocks + STAGE_BLOCKS - 1) / STAGE_BLOCKS;
    char *images_at = (char *)shared + (-shared_address(shared) & 1023);
    char *words_at = images_at + ring * image_bytes;
    char *scales_at = words_at + ring * tiles_here * words_bytes;
    Stage *tables_at = (Stage *)(scales_at + ring * tiles_here * tables * scales_bytes);
    float4 *handed = (float4 *)(tables_at + matrix_count * stages);

    int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0),
        warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);
    int lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int i = 0; i < ring; i++) {
            barrier_init(shared_address(&full[i]), 1 + 1 + 32);  // x, words, the scales of each lane of a warp
            barrier_init(shared_address(&empty[i]), 4 * warpgroups_n * (EVERY_LANE_ARRIVES ? 32 : 1));
        }
        barrier_init_done();
    }
    for (int i = 0; i < matrix_count; i++) write_stages(tables_at + i * stages, matrices.at[i], stages);
    __syncthreads();

    Schedule schedule(items, stages, waves, run_stages);
    Segment segment;
    // The matrix of an item, and the first of its column tiles that belong to the item.
    auto find_matrix = [&](int item, int &first_tile) {
        int group = item / row_blocks, i = 0;
        auto groups_of = [&](int i) { return (matrices.at[i].n + TILE * tiles_here - 1) / (TILE * tiles_here); };
        while (i + 1 < matrix_count && group >= groups_of(i)) group -= groups_of(i++);
        first_tile = group * tiles_here;
        return i;
    };

    if (warpgroup == 2) {
        give_registers_back<40>();
        if (warp == 0) {  // copies x
            wait_for_previous_kernel();
            let_next_kernel_start();
            Cursor cursor = {0, 0};
            if (lane != 0) return;
            fence_bulk();
            while (schedule.next(segment)) {
                const uint8 *image = x + ((int64)(segment.item % row_blocks) * stages + segment.begin) * image_bytes;
                for (int s = segment.begin; s < segment.end; s++) {
                    uint32 barrier = shared_address(&full[cursor.slot]);
                    barrier_wait(shared_address(&empty[cursor.slot]), cursor.parity ^ 1);
                    barrier_arrive_expecting(barrier, image_bytes);
                    copy_bulk(shared_address(images_at + cursor.slot * image_bytes), image, image_bytes, barrier);
                    image += image_bytes;
                    cursor.advance(1, ring);
                }
            }
        } else {  // copies the weights of every third stage: what no kernel changes, so without waiting for the one before
            // A parity tells a phase from the one before, not from the one before that. So a warp waits for the slots of its own
            // stages alone. The consumers cannot be a phase further: that takes what only this warp copies. Nor two behind:
            // when it copied stage s - 3 they were done with s - 3 - ring, and so with s - 2 ring in rings of 3 or more; where
            // the warpgroups take turns, the same holds of s - 6, in rings of 6 or more (ops/qmatmul_wgmma.py).
            Cursor cursor = {0, 0};
            int behind = warp - 1;  // stages until the next one of this warp
            cursor.advance(behind, ring);
            while (schedule.next(segment)) {
                int first_tile, i = find_matrix(segment.item, first_tile);
                const Matrix &matrix = matrices.at[i];
                const Stage *table = tables_at + i * stages;
                int count = min(tiles_here, (matrix.n + TILE - 1) / TILE - first_tile);
                int s = segment.begin + behind;
                for (; s < segment.end; s += COPIERS) {
                    Stage stage = table[s];
                    uint32 barrier = shared_address(&full[cursor.slot]);
                    barrier_wait(shared_address(&empty[cursor.slot]), cursor.parity ^ 1);
                    if (lane == 0) barrier_arrive_expecting(barrier, count * stage.bytes);
                    __syncwarp();
                    uint32 words = shared_address(words_at + cursor.slot * tiles_here * words_bytes);
                    if (lane < count) {
                        int64 first = (int64)(first_tile + lane) * matrix.words_per_column_tile + stage.start * 32;
                        copy_bulk(words + lane * words_bytes, matrix.tiles + first, stage.bytes, barrier);
                    }
                    char *scales = scales_at + cursor.slot * tiles_here * tables * scales_bytes;
                    int chunks = 4 << stage.groups_between();  // of 16 bytes: one group or two
#pragma unroll
                    for (int v = lane; v < tiles_here * 8; v += 32) {
                        int tile = v / 8, chunk = v % 8;
                        if (tile >= count || chunk >= chunks) continue;
                        int64 from = ((int64)(first_tile + tile) * matrix.groups + stage.group) * TILE + chunk * 8;
                        char *to = scales + tile * tables * scales_bytes + chunk * 16;
                        copy_async_16(to, matrix.scales + from);
                        if constexpr (has_zeros) copy_async_16(to + scales_bytes, matrix.zeros + from);
                    }
                    barrier_arrive_after_copies(barrier);
                    cursor.advance(COPIERS, ring);
                }
                behind = s - segment.end;
            }
        }
        return;
    }

    take_registers<232>();
    wait_for_previous_kernel();
    let_next_kernel_start();
    int warpgroup_n = warpgroup % warpgroups_n, warpgroup_k = warpgroup / warpgroups_n;
    int tile_here = 4 * warpgroup_n + warp, g = lane / 4, t = lane % 4, thread = threadIdx.x % 128;
    Cursor cursor = {0, 0};
    cursor.advance(
        warpgroup_k, ring);    // an even ring, where the warpgroups take turns: a slot is always the same one's
    int behind = warpgroup_k;  // stages until the next one of this warpgroup
    // Addresses in shared memory, kept in registers: the compiler would compute them anew in every stage.
    uint32 words_lane = kept(shared_address(words_at + tile_here * words_bytes));
    uint32 scales_lane = kept(shared_address(scales_at + tile_here * tables * scales_bytes));
    uint32 full_at = kept(shared_address(full)), empty_at = kept(shared_address(empty));
    uint32 descriptor = kept((uint32)wgmma_descriptor(shared_address(images_at)));
    uint32 tables_start = kept(shared_address(tables_at));
    lane = kept(lane);
    constexpr bool is_fetched = is_one_width(widths);  // then the words of a block are in registers before their turn
    Block<widest(widths), has_zeros> fetched;

    while (schedule.next(segment)) {
        __syncwarp();  // lanes without columns were done with the last item before the others: products are of whole warps
        int first_tile, matrix_index = find_matrix(segment.item, first_tile);
        float sums[2][rows / 2];  // [a][register]
#pragma unroll
        for (int a = 0; a < 2; a++)
            for (int i = 0; i < rows / 2; i++) sums[a][i] = 0;

        uint32 unfinished = 0;  // barrier of the slot whose products may still run
        int s = segment.begin + behind;
        auto give_back = [&] {  // the slot of `unfinished`, for whose lanes lane 0 speaks
            __syncwarp();
            if (unfinished && (EVERY_LANE_ARRIVES || lane == 0)) barrier_arrive(unfinished);
        };
        uint32 of_blocks;
        // Wait for the stage at the cursor, and fetch what its first block needs.
        auto begin_stage = [&](int s) {
            of_blocks = load_shared_4(tables_start + (matrix_index * stages + s) * (int)sizeof(Stage) + 12);
            barrier_wait(full_at + cursor.slot * 8, cursor.parity);
            if constexpr (is_fetched)
                fetched.load(
                    words_lane + cursor.slot * (tiles_here * words_bytes),
                    scales_lane + cursor.slot * (tiles_here * tables * scales_bytes), scales_bytes, lane);
        };
        if (s < segment.end) begin_stage(s);
        while (s < segment.end) {
            Stage stage;
            stage.of_blocks = of_blocks;
            uint32 words = words_lane + cursor.slot * (tiles_here * words_bytes);
            uint32 scales = scales_lane + cursor.slot * (tiles_here * tables * scales_bytes);
            uint32 b = descriptor + cursor.slot * (image_bytes >> 4), slot_empty = empty_at + cursor.slot * 8;
            s += warpgroups_k;
            uint32 A[2][2][2][4];  // [block][a][step][register]
#pragma unroll
            for (int block = 0; block < STAGE_BLOCKS; block++) {
                if (block == 1) {
                    words += stage.second_offset() * 128;
                    scales += stage.groups_between() * (TILE * 2);
                }
                if constexpr (is_fetched)
                    decode_block<T>(A[block], fetched);
                else
                    with_width(stage.bits(block), [&](auto width) {
                        constexpr int bits = decltype(width)::bits;
                        if constexpr (widths >> bits & 1) {
                            Block<bits, has_zeros> loaded;
                            loaded.load(words, scales, scales_bytes, lane);
                            decode_block<T>(A[block], loaded);
                        }
                    });
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < 2; step++)
#pragma unroll
                    for (int a = 0; a < 2; a++)
                        wgmma_add<T, rows>(sums[a], A[block][a][step], wgmma_descriptor_of(b + 4 * block + 2 * step));
                wgmma_commit();
                if (block == 1) {
                    cursor.advance(warpgroups_k, ring);
                    if (s < segment.end) begin_stage(s);
                } else if constexpr (is_fetched) {
                    fetched.load(
                        words + stage.second_offset() * 128, scales + stage.groups_between() * (TILE * 2), scales_bytes,
                        lane);
                }
                // The products of the block before are done: its registers may be written, its slot given back.
                wgmma_wait<1>();
                if (block == 0) give_back();
            }
            unfinished = slot_empty;
        }
        behind = s - segment.end;
        wgmma_wait<0>();
        give_back();

        // Sums as vectors of four columns, 4g .. 4g+3, of row 8i + 2t + e; q = 2i + e.
        float4 sum[vectors];
        auto vector_at = [&](int q) {
            int at = q / 2 * 4 + q % 2;
            return make_float4(sums[0][at], sums[0][at + 2], sums[1][at], sums[1][at + 2]);
        };
        int first_row = segment.item % row_blocks * rows;
        if constexpr (warpgroups_k == 1) {
#pragma unroll
            for (int q = 0; q < vectors; q++) sum[q] = vector_at(q);
        } else {  // each warpgroup finishes half of the rows: it hands over the other half
            float4 *to = handed + (1 - warpgroup_k) * (vectors * 128) + thread;
            const float4 *from = handed + warpgroup_k * (vectors * 128) + thread;
#pragma unroll
            for (int q = 0; q < vectors; q++) {
                float4 low = vector_at(q), high = vector_at(q + vectors);
                sum[q] = warpgroup_k ? high : low;
                to[q * 128] = warpgroup_k ? low : high;
            }
            named_barrier(3, 256);
#pragma unroll
            for (int q = 0; q < vectors; q++) {
                float4 v = from[q * 128];
                sum[q].x += v.x, sum[q].y += v.y, sum[q].z += v.z, sum[q].w += v.w;
            }
            named_barrier(3, 256);  // before sums are handed over anew
            first_row += warpgroup_k * (rows / 2);
        }

        if (segment.parts > 1) {  // the last part to arrive adds all of them, in the order of K
            auto part_at = [&](int block) {
                int is_first = block == segment.first;
                return (float4 *)partial + ((2 * block + is_first) * 2 + warpgroup) * (vectors * 128) + thread;
            };
            uint32 *counter = arrived + 2 * (segment.item - schedule.whole_end) + warpgroup;
            auto add = [](float4 &to, float4 v) { to.x += v.x, to.y += v.y, to.z += v.z, to.w += v.w; };
            // Of two parts, the later one need not go through memory. Both orders of two numbers have the same sum.
            if (thread == 0) is_second[warpgroup] = segment.parts == 2 && load_acquire(counter) == 1;
            named_barrier(1 + warpgroup, 128);
            if (is_second[warpgroup]) {
                named_barrier(1 + warpgroup, 128);  // before is_second is written anew
                const float4 *other = part_at(2 * segment.first + 1 - blockIdx.x);
                __threadfence();
#pragma unroll
                for (int q = 0; q < vectors; q++) add(sum[q], __ldcg(other + q * 128));
            } else {
                float4 *own = part_at(blockIdx.x);
#pragma unroll
                for (int q = 0; q < vectors; q++) own[q * 128] = sum[q];
                __threadfence();
                named_barrier(1 + warpgroup, 128);
                if (thread == 0) is_last[warpgroup] = atomicAdd(counter, 1u) == segment.parts - 1;
                named_barrier(1 + warpgroup, 128);
                if (!is_last[warpgroup]) continue;
                __threadfence();
                constexpr int batch = vectors < 8 ? vectors : 8;  // loads in flight
#pragma unroll
                for (int q = 0; q < vectors; q += batch) {
                    float4 total[batch] = {};
                    for (int part = segment.first; part < segment.first + segment.parts; part++) {
                        const float4 *other = part_at(part);
#pragma unroll
                        for (int i = 0; i < batch; i++) add(total[i], __ldcg(other + (q + i) * 128));
                    }
#pragma unroll
                    for (int i = 0; i < batch; i++) sum[q + i] = total[i];
                }
            }
            if (thread == 0) *counter = 0;
        }

        const Matrix &matrix = matrices.at[matrix_index];
        int column = (first_tile + tile_here) * TILE + 4 * g;
        if (column >= matrix.n) continue;
        float4 bias = make_float4(0, 0, 0, 0);
        if (matrix.bias) {
            const float *p = matrix.bias + column;
            bias = make_float4(p[0], p[1], p[2], p[3]);
        }
        auto finish = [&](auto one) {
            using Y = decltype(one);
            using Four = Vector<Y, 4>;
#pragma unroll
            for (int q = 0; q < vectors; q++) {
                int row = first_row + q / 2 * 8 + 2 * t + q % 2;
                if (row >= m) continue;
                int64 at = (int64)row * y_stride + matrix.first_column + column;
                float v[4] = {sum[q].x + bias.x, sum[q].y + bias.y, sum[q].z + bias.z, sum[q].w + bias.w};
                Four out;
                if (residual) {
                    out = *(const Four *)((const Y *)residual + at);
                    for (int c = 0; c < 4; c++) v[c] += to_float(out[c]);
                }
                for (int c = 0; c < 4; c++) out[c] = from_float<Y>(v[c]);
                *(Four *)((Y *)y + at) = out;
            }
        };
        if (y_is_float)
            finish(0.0f);
        else
            finish(T{});
    }
#endif
}
