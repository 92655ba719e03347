// attention_decode: out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, h / group]) * v[b, j, h / group], few queries
//
// Work split  the queries * group rows of one kv head are the rows of mma tiles (16 to an item), so that K and V are read once
//             for all of them. As many blocks as fit the GPU at once share out the tiles of 16 keys of all items evenly, in
//             order (attention_shares.cuh): a block has the end of one item, whole items, the beginning of another. How long a
//             share is follows from the true lengths of all sequences, on the device: all tiles / blocks, or more where that is
//             too few to be worth the parts to be added. So a launch made for longer caches computes the same bits, and blocks
//             without a share end at once. The warps of a block take turns over its tiles, each with its own cp.async ring of
//             `stages` tiles, and join through shared memory. Of an item that is split each block leaves (sum of weight * V,
//             top, sum of weights) per row in `parts`; the last one to arrive adds them in order.
//             While the kernel before this one still works, blocks find their share and ask for its first keys to come into
//             L2. Afterwards they load by what they found, and compare the tables while the keys come: they may have changed.
// Numerics    as attention_prefill; codes as float16 (kv_tile.cuh); the joins of warps and parts are fp32 in a fixed order:
//             same bits every run.
// Limits      head_dim a multiple of 8, HEAD that rounded up to 16, at most 256; codes: a multiple of 64, pages of 2 tokens or
//             more. 16-byte aligned arrays; any number of queries, capacity and batch. out may be q.
// Traffic     visible keys * kv_heads * 2 rows (of values, or of codes and scales) for every 16 rows of q; parts: 8 * rows *
//             blocks * (head_dim + 2) bytes at most, written and read.
// Reference   cupyq/ops/attention.py: attention_reference. Method: Flash-Decoding (pytorch.org/blog/flash-decoding).
#include "attention_shares.cuh"

// The 16 rows of an item, or fewer: row r is head r % group of a kv head at query r / group, counted from the sequence's first.
struct ItemRows {
    int first, count, group, kv_head, heads;
    int64 first_query;
    __device__ __forceinline__ ItemRows(const Segment &s, int group, int kv_heads)
        : first(16 * s.row_tile),
          count(min(16, s.sequence.queries * group - first)),
          group(group),
          kv_head(s.kv_head),
          heads(kv_heads * group),
          first_query(s.sequence.first_row) {}
    __device__ __forceinline__ int query(int r) const { return (first + r) / group; }
    __device__ __forceinline__ int head(int r) const { return kv_head * group + (first + r) % group; }
    // Of q and out.
    __device__ __forceinline__ int64 row(int r) const { return (first_query + query(r)) * heads + head(r); }
};

template <typename T, int HEAD, CacheKind k_kind, CacheKind v_kind, int warps, int stages>
__global__ void __launch_bounds__(32 * warps, warps > 4 || HEAD > 128 ? 1 : 2) attention_decode(
    const T *q,             // [batch, most_queries, heads, head_dim]; with query_starts [most_queries, heads, head_dim]
    const uint8 *k,         // [pages, page size, kv_heads, head_dim] of T, or codes
    const half *k_scales,   // of codes
    const uint8 *v,         // as k
    const half *v_scales,   // as k_scales
    const int *kv_lengths,  // [batch] or null: all of capacity
    const int *block_table,   // [batch, max_pages] or null: page b is sequence b, its size the capacity
    const int *query_starts,  // [batch + 1] or null
    const float *sinks,       // [heads] or null
    T *out,                   // as q
    float *parts,             // [blocks, 2] times: [part_rows, head_dim], then [part_rows, 2]: top, sum; padded to 4
    uint32 *arrived,          // a counter per block: zero before and after. Null, as parts, where no item can be split
    int batch, int most_queries, int heads, int kv_heads, int head_dim, int capacity, int page_shift, int max_pages,
    int pages, int is_causal, int window, float scale, float softcap,  // softcap 0: none
    int most_shares,    // how many fit the GPU at once, each with a block per kv head; 0: no item is split
    int least_tiles,    // of a share, where an item has so many
    int part_rows,      // 16, or less where no item has so many
    int ahead_tiles) {  // tiles of a warp that come into L2 before their turn
    using KLayout = TileLayout<k_kind, HEAD>;
    using VLayout = TileLayout<v_kind, HEAD>;
    using M = typename MathType<k_kind, T>::type;
    constexpr int row_values = HEAD + 8, threads = 32 * warps, stage_bytes = KLayout::bytes + VLayout::bytes;
    constexpr int part_floats = 16 * row_values + 32;  // of one warp: acc, top, sum; laid over its ring at the end
    constexpr int warp_bytes = stages * stage_bytes > 4 * part_floats ? stages * stage_bytes : 4 * part_floats;
    static_assert(stage_bytes % 16 == 0, "the ring's stages begin at multiples of 16 bytes");

    let_next_kernel_start();
    if constexpr (!on_tensor_cores<M> || !on_tensor_cores<typename MathType<v_kind, T>::type>) {
        __trap();
        __builtin_unreachable();
    }

    extern __shared__ __align__(16) uint8 shared[];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint8 *ring = shared + warp * warp_bytes;    // [stages, K and V]
    M *sQ = (M *)(shared + warps * warp_bytes);  // [16, row_values]
    float *result = (float *)shared;  // [16, row_values], over the first warp's part: what q4 and q8 transform

    int group = heads / kv_heads;
    KVPages cache = {block_table, capacity, page_shift, max_pages, pages};
    Logits logits(scale, softcap);
    Shares shares = {kv_lengths, query_starts, batch, most_queries, group, kv_heads, capacity, is_causal, window,
        most_shares, least_tiles, part_rows};

    // The segment's tiles that are this warp's: every warps-th from `first` on, counted from key 0.
    struct Tiles {
        int first, count;
    };
    auto tiles_of = [&](const Segment &segment) {
        int first = segment.sequence.begin / tile_keys + segment.first + warp;
        return Tiles{first, (segment.count - warp + warps - 1) / warps};
    };
    // The row of the arrays that a tile's first key is in, and how many keys from it on lie at one distance from each other.
    int run_keys = block_table ? min(1 << page_shift, tile_keys) : tile_keys;
    auto tile_row = [&](const Segment &segment, int tile) {
        return cache.row_of(segment.b, min(tile * tile_keys, capacity - 1)) * kv_heads + segment.kv_head;
    };
    int64 all_rows = (block_table ? (int64)pages << page_shift : (int64)pages * capacity) * kv_heads;

    auto ask_ahead = [&](const Segment &segment) {
        Tiles own = tiles_of(segment);
#pragma unroll 1
        for (int i = 0; i < min(own.count, ahead_tiles); i++) {
            int tile = own.first + i * warps;
            int64 row = tile_row(segment, tile);
            auto prefetch = [&](const uint8 *array, int row_bytes) {
                constexpr int lines = (2 * HEAD + 127) / 128;  // of codes fewer
#pragma unroll 1
                for (int j = lane; j < tile_keys * lines; j += 32) {
                    int r = j / lines, at = j % lines * 128;
                    if (r < run_keys && tile * tile_keys + r < segment.sequence.end && at < row_bytes)
                        prefetch_l2(array + (row + (int64)r * kv_heads) * row_bytes + at);
                }
            };
            prefetch(k, k_kind == dense ? 2 * head_dim : KLayout::row_bytes);
            prefetch(v, v_kind == dense ? 2 * head_dim : VLayout::row_bytes);
        }
    };

    Segment segment = {}, next = {};
    Entry seen = {};
    int64 next_row = 0;  // of the next tile to be loaded
    // Look 0 finds the first segment before the wait, look 1 once more after it: the same one, unless a table has changed.
    constexpr int first_look = __CUDA_ARCH__ >= 900 ? 0 : 1;
#pragma unroll 1
    for (int look = first_look;; look++) {
        Segment found = next;
        if (look < 2) {
            Entry now = shares.own_entry();
            bool is_known = look > first_look && most_shares > 0 && batch <= 32;
            is_known = is_known && __ballot_sync(0xffffffffu, now == seen) == 0xffffffffu;
            found = is_known ? segment : shares.first_segment(blockIdx.x, now);
            seen = now;
        }
        if (look == 0) ask_ahead(found);
        bool is_new = look != 1 || !(found == segment);
        if (look == 1 && is_new) copy_async_wait<0>();  // those of the wrong one
        segment = found;
        const Sequence &sequence = segment.sequence;
        ItemRows rows(segment, group, kv_heads);
        Tiles own = tiles_of(segment);
        if (look == first_look) { wait_for_previous_kernel(); }

        // --- on their way: queries, and the first of this warp's keys ---
        auto load_keys = [&](int i) {
            int first = (own.first + i * warps) * tile_keys;
            uint8 *stage = ring + i % stages * stage_bytes;
            RowRun run = {next_row, kv_heads, 0, run_keys, sequence.begin - first, sequence.end - first};
            if (i + 1 < own.count) next_row = tile_row(segment, own.first + (i + 1) * warps);  // on its way meanwhile
#pragma unroll 1
            while (true) {
                load_rows<k_kind, HEAD>(stage, k, k_scales, run, head_dim, all_rows);
                load_rows<v_kind, HEAD>(stage + KLayout::bytes, v, v_scales, run, head_dim, all_rows);
                if (run.to == tile_keys) break;
                run.from = run.to, run.to += run_keys;
                int key = min(first + run.from, capacity - 1);
                run.first = (cache.row_of(segment.b, key) - run.from) * kv_heads + segment.kv_head;
            }
        };
        if (is_new) {
#pragma unroll 1
            for (int chunk = threadIdx.x; chunk < 16 * HEAD / 8; chunk += threads) {
                int r = chunk / (HEAD / 8), c = chunk % (HEAD / 8) * 8;
                bool is_valid = r < rows.count && c < head_dim;
                copy_async_16(sQ + r * row_values + c, q + (is_valid ? rows.row(r) * head_dim + c : 0), is_valid);
            }
            copy_async_commit();
            if (own.count > 0) next_row = tile_row(segment, own.first);
#pragma unroll 1
            for (int i = 0; i < stages; i++) {
                if (i < own.count) load_keys(i);
                copy_async_commit();
            }
        }
        if (look == 0) continue;
        if (segment.count == 0) return;
        copy_async_wait<stages>();  // the queries that this thread has asked for
        if constexpr (k_kind != dense) {
#pragma unroll 1
            for (int chunk = threadIdx.x; chunk < 16 * HEAD / 8; chunk += threads) {  // all lanes of a warp, or none
                M *row = sQ + chunk / (HEAD / 8) * row_values;
                int c = chunk % (HEAD / 8) * 8;
                auto values = *(const Vector<T, 8> *)(row + c);
                float x[8];
                for (int i = 0; i < 8; i++) x[i] = to_float(values[i]);
                if constexpr (is_transformed<k_kind>) {
                    hadamard_floats(x);
                    for (int i = 0; i < 8; i++) x[i] *= 1.0f / 32;
                }
                __syncwarp();  // values change places within their 64
                for (int i = 0; i < 8; i++) row[column_of_value<k_kind>(c + i)] = from_float<M>(x[i]);
            }
        }
        __syncthreads();
        Queries<M, HEAD> queries;
        queries.load(sQ);
        auto visible = [&](int r) {
            return visible_keys(rows.query(r), sequence.queries, sequence.length, is_causal, window);
        };
        const KeyRange row_keys[2] = {visible(lane / 4), visible(lane / 4 + 8)};
        ScaleHalves halves = {
            (int)((block_table ? 0 : (int64)segment.b * capacity * kv_heads) + segment.kv_head & 1), kv_heads & 1};

        // --- this warp's tiles of the keys ---
        float acc[HEAD / 8][4], top[2], sum[2];  // as SoftmaxRows
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++)
            for (int i = 0; i < 4; i++) acc[n][i] = 0;
        for (int half = 0; half < 2; half++) top[half] = -infinity_float(), sum[half] = 0;

#pragma unroll 1
        for (int i = 0; i < own.count; i++) {
            copy_async_wait<stages - 1>();
            __syncwarp();  // this tile has arrived for all lanes
            const uint8 *stage = ring + i % stages * stage_bytes;
            float scores[2][4];
            score_tile<k_kind, T, HEAD>(scores, queries, stage, halves);

            int column = (own.first + i * warps) * tile_keys + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < 2; n++)
                for (int e = 0; e < 4; e++) {
                    int key = column + 8 * n + e % 2;
                    if (logits.cap > 0) scores[n][e] = logits.capped(scores[n][e]);
                    if (key < row_keys[e / 2].begin || key >= row_keys[e / 2].end) scores[n][e] = -infinity_float();
                }
            float shrink[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float highest = fmaxf(
                    fmaxf(scores[0][2 * half], scores[0][2 * half + 1]),
                    fmaxf(scores[1][2 * half], scores[1][2 * half + 1]));
                highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
                highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
                highest = fmaxf(highest, top[half]);
                // A row that has seen no key yet keeps minus infinity; zero in its place gives weights of 0, not NaN.
                float offset = highest == -infinity_float() ? 0 : highest * logits.multiplier;
                shrink[half] = exp2_fast(fmaf(top[half], logits.multiplier, -offset));
                top[half] = highest;
                sum[half] *= shrink[half];
#pragma unroll
                for (int n = 0; n < 2; n++)
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        scores[n][e] = exp2_fast(fmaf(scores[n][e], logits.multiplier, -offset));
                        sum[half] += scores[n][e];
                    }
            }
            // Rarely, once the largest scores were seen.
            if (__ballot_sync(0xffffffffu, shrink[0] != 1 || shrink[1] != 1)) {
#pragma unroll
                for (int n = 0; n < HEAD / 8; n++)
                    for (int i = 0; i < 4; i++) acc[n][i] *= shrink[i / 2];
            }
            add_values<v_kind, T, HEAD>(acc, scores, stage + KLayout::bytes, halves);
            __syncwarp();  // all lanes are done with the tile, whose place comes free
            if (i + stages < own.count) load_keys(i + stages);
            copy_async_commit();
        }

        // --- join the warps, in warp order ---
        copy_async_wait<0>();  // lanes are done reading the ring; the other warps have rings of their own
        float *warp_part = (float *)ring;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = lane / 4 + 8 * half;
            float total = sum[half] + __shfl_xor_sync(0xffffffffu, sum[half], 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            if (r >= rows.count) continue;
            if (lane % 4 == 0) {
                warp_part[16 * row_values + r] = top[half] * logits.multiplier;
                warp_part[16 * row_values + 16 + r] = total;
            }
            float *row = warp_part + r * row_values;
#pragma unroll
            for (int n = 0; n < HEAD / 8; n++) {
                if constexpr (v_kind == dense) {
                    *(float2 *)(row + 8 * n + lane % 4 * 2) = make_float2(acc[n][2 * half], acc[n][2 * half + 1]);
                } else {  // column 8 g + n % 8 of 64 was column g of product n
                    float *first = row + n / 8 * 64 + lane % 4 * 16 + n % 8;
                    first[0] = acc[n][2 * half], first[8] = acc[n][2 * half + 1];
                }
            }
        }
        next = shares.next_segment(segment);
        ask_ahead(next);
        __syncthreads();

        auto write = [&](int r, int column, float4 values, float factor) {
            values = make_float4(values.x * factor, values.y * factor, values.z * factor, values.w * factor);
            if constexpr (is_transformed<v_kind>) {
                *(float4 *)(result + r * row_values + column) = values;
            } else {
                uint2 packed = make_uint2(pack_pair<T>(values.x, values.y), pack_pair<T>(values.z, values.w));
                *(uint2 *)(out + rows.row(r) * head_dim + column) = packed;
            }
        };
        auto write_transformed = [&] {
            if constexpr (is_transformed<v_kind>) {
                __syncthreads();
                int chunks = rows.count * HEAD / 8;
#pragma unroll 1
                for (int base = 0; base < chunks; base += threads) {  // all lanes together
                    int chunk = base + threadIdx.x;
                    int r = min(chunk, chunks - 1) / (HEAD / 8), c = chunk % (HEAD / 8) * 8;
                    float x[8];
                    for (int i = 0; i < 8; i++) x[i] = result[r * row_values + c + i];
                    hadamard_floats(x);
                    Vector<T, 8> values;
                    for (int i = 0; i < 8; i++) values[i] = from_float<T>(x[i] * (1.0f / 32));
                    if (chunk < chunks) *(Vector<T, 8> *)(out + rows.row(r) * head_dim + c) = values;
                }
            }
        };

        constexpr int pieces = HEAD / 4;  // of a row; those after head_dim are the last one again
        auto column_of = [&](int i) { return min(i % pieces * 4, head_dim - 4); };
        auto join_warps = [&](auto take) {  // take(row, column, values, top, sum) for every piece
#pragma unroll 1
            for (int i = threadIdx.x; i < rows.count * pieces; i += threads) {
                int r = i / pieces, column = column_of(i);
                auto part = [&](int w) { return (const float *)(shared + w * warp_bytes); };
                float highest = -infinity_float(), total = 0;
                float4 values = make_float4(0, 0, 0, 0);
                for (int w = 0; w < warps; w++) highest = fmaxf(highest, part(w)[16 * row_values + r]);
                float offset = highest == -infinity_float() ? 0 : highest;
                for (int w = 0; w < warps; w++) {
                    float weight = exp2_fast(part(w)[16 * row_values + r] - offset);
                    float4 x = *(const float4 *)(part(w) + r * row_values + column);
                    total += weight * part(w)[16 * row_values + 16 + r];
                    values.x += weight * x.x, values.y += weight * x.y;
                    values.z += weight * x.z, values.w += weight * x.w;
                }
                take(r, column, values, highest, total);
            }
        };
        auto factor_of = [&](int r, float total, float highest) {
            return inverse_sum_with_sink(total, highest, sink_exponent(sinks, rows.head(r)));
        };
        bool finishes = segment.is_whole();
        if (finishes) {
            join_warps([&](int r, int column, float4 values, float highest, float total) {
                write(r, column, values, factor_of(r, total, highest));
            });
        } else {
            // --- the last to arrive adds all parts of the item, in order ---
            ItemParts item(segment, kv_heads);
            int part_stride = part_rows * head_dim + (2 * part_rows + 3) / 4 * 4, stats_at = part_rows * head_dim;
            float *first_part = parts + 2 * item.first_block * part_stride;  // or the next one
            float *own_part = first_part + item.slot(item.index) * part_stride;
            join_warps([&](int r, int column, float4 values, float highest, float total) {
                *(float4 *)(own_part + r * head_dim + column) = values;
                if (column == 0) *(float2 *)(own_part + stats_at + 2 * r) = make_float2(highest, total);
            });
            __syncthreads();
            bool *is_last = (bool *)sQ;  // the queries are used up
            if (threadIdx.x == 0) *is_last = arrives_last(arrived + item.first_block, item.count);
            __syncthreads();
            finishes = *is_last;
            if (finishes) {
                // A warp a row: its parts come to shared memory, as many at a time as there is room for, in short loops. This
                // is text that no multiprocessor has at hand, and reading it takes longer than what it does.
                constexpr int own_pieces = (pieces + 31) / 32;  // of a lane
                constexpr int kept_bytes = is_transformed<v_kind> ? 4 * 16 * row_values : 0;
                constexpr int room = (warps * warp_bytes - kept_bytes) / (warps * 4 * HEAD);
                constexpr int together = room < 32 ? room : 32;
                static_assert(together >= 8, "parts come in batches that hide their latency");
                float *came = (float *)(shared + kept_bytes) + warp * (together * HEAD);
#pragma unroll 1
                for (int r = warp; r < rows.count; r += warps) {
                    auto stat_of = [&](int s, int end) {
                        if (s >= end) return make_float2(-infinity_float(), 0);
                        return __ldcg((const float2 *)(first_part + item.slot(s) * part_stride + stats_at + 2 * r));
                    };
                    float highest = -infinity_float(), total = 0;
                    float4 values[own_pieces] = {};
#pragma unroll 1
                    for (int first = 0; first < item.count; first += together) {
                        int count = min(together, item.count - first);
#pragma unroll 1
                        for (int i = lane; i < count * pieces; i += 32) {
                            const float *at = first_part + item.slot(first + i / pieces) * part_stride + r * head_dim;
                            copy_async_16(came + 4 * i, at + column_of(i));
                        }
                        copy_async_commit();
                        float2 stat = stat_of(first + lane, first + count);
                        if (first == 0) {
                            highest = stat.x;
#pragma unroll 1
                            for (int s = count + lane; s < item.count; s += 32)
                                highest = fmaxf(highest, stat_of(s, item.count).x);
                            for (int lanes = 16; lanes > 0; lanes /= 2)
                                highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, lanes));
                        }
                        float weight = exp2_fast(stat.x - (highest == -infinity_float() ? 0 : highest));
                        total += weight * stat.y;
                        copy_async_wait<0>();
                        __syncwarp();
#pragma unroll 2
                        for (int s = 0; s < count; s++) {
                            float factor = __shfl_sync(0xffffffffu, weight, s);
#pragma unroll
                            for (int piece = 0; piece < own_pieces; piece++) {
                                float4 x = *(const float4 *)(came + s * HEAD + (lane + 32 * piece) % pieces * 4);
                                values[piece].x += factor * x.x, values[piece].y += factor * x.y;
                                values[piece].z += factor * x.z, values[piece].w += factor * x.w;
                            }
                        }
                        __syncwarp();  // before others come to their place
                    }
                    for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
                    float factor = factor_of(r, total, highest);
#pragma unroll
                    for (int piece = 0; piece < own_pieces; piece++)
                        write(r, column_of(lane + 32 * piece), values[piece], factor);
                }
            }
        }
        if (finishes) write_transformed();
        __syncthreads();  // before the next segment's keys
    }
}
