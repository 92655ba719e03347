// attention_wgmma: out[b, i, h] = sum_j softmax_j(scale * q[b, i, h] . k[b, j, h / group]) * v[b, j, h / group], many queries
//
// For many queries, on Hopper. An *item* is 64 * warpgroups queries of one head.
//
// Work split  a thread block has `warpgroups` warpgroups that multiply, 64 queries each, and two warps that copy: the queries
//             and a ring of tiles of K, and one of V, from contiguous caches or page by page, as tensor maps say. A warpgroup
//             starts the scores of the next tile, then the product of its weights of this tile with V; while both run it waits
//             for the scores and turns them into weights. Where it takes_turns, a warpgroup starts its products when the one
//             before has started its own: the softmax of one then runs under the products of the other. Tiles go from the
//             last visible key to the first.
//             From caches of codes, four warps make the tiles instead: each has a quarter of a tile's rows come to shared memory
//             as they are stored, a tile ahead, and decodes them into the ring (kv_wgmma.cuh).
//             One thread block per multiprocessor takes items in turns, there and back, those with most keys first.
// Numerics    products of 16-bit values summed in fp32; online softmax in fp32, base 2; weights rounded to T for the product
//             with V, their sum not; one rounding at the store. The offset is the largest score, not one some way behind it,
//             which would save rescaling: a weight that decides alone is then 1, and rounds to itself. Key order is fixed:
//             same bits every run, wherever pages lie. Codes meet the tensor cores as float16, q4 and q8 transformed, as in
//             attention_decode.
// Limits      sm_90a. HEAD 64, 96, 128 or 256, the whole head, with codes a multiple of 64; 16-byte aligned arrays; pages a power
//             of two of tokens, from 8 on where caches are dense; both are, or none; any seq, capacity and batch. out may be q.
// Traffic     2 * rows * heads * HEAD values (q, out) + K and V, or their codes, once from memory (each item again from L2);
//             4 * HEAD flops per visible (query, key) pair and head.
// Reference   cupyq/ops/attention.py: attention_reference. Method: FlashAttention-3, arXiv 2407.08608.
#include "kv_wgmma.cuh"

// Of q: [rows, heads, HEAD], boxes of an item's queries, one head and 64 columns. Of k and v: [pages, page_size, kv_heads,
// HEAD], boxes of min(page_size, tile_keys) tokens, one head and 64 columns; not used where the caches hold codes.
struct alignas(16) AttentionMaps {
    uint8 padding[48];  // _tensor_maps.py says why
    TensorMap q, k, v;
};

template <
    typename T, int HEAD, int tile_keys, int stages, int warpgroups, bool takes_turns, bool has_softcap,
    CacheKind k_kind = dense, CacheKind v_kind = dense>
__global__ void __launch_bounds__(128 * (warpgroups + 1), 1) attention_wgmma(
    const __grid_constant__ AttentionMaps maps,
    T *out,                   // [batch, seq, heads, HEAD], or [rows, heads, HEAD]
    const int *kv_lengths,    // [batch] or null: all of capacity
    const int *block_table,   // [batch, max_pages] or null: page b is sequence b
    const int *query_starts,  // [batch + 1] or null: seq rows each
    const float *sinks,       // [heads] or null
    int items, int batch, int rows, int heads, int kv_heads, int capacity, int page_size, int max_pages, int pages,
    int is_causal, int window, float scale, float softcap,  // rows: of q; softcap only where has_softcap
    const uint8 *k_codes,    // [pages, page_size, kv_heads, row bytes]; null where caches are dense, as the next ones
    const half *k_scales,    // [pages, page_size, kv_heads, HEAD / 32], e4m3: [pages, page_size, kv_heads]
    const uint8 *v_codes,    // as k_codes
    const half *v_scales) {  // as k_scales
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
    __trap();
#else
    constexpr int tile_rows = 64 * warpgroups, blocks = (HEAD + 63) / 64;  // of 64 columns
    constexpr int q_block_bytes = tile_rows * 128, key_block_bytes = tile_keys * 128;
    constexpr int q_bytes = blocks * q_block_bytes, tile_bytes = blocks * key_block_bytes;
    constexpr bool overlays = HEAD > 128;  // results lie where the queries were on their way out
    constexpr bool has_codes = k_kind != dense;
    static_assert(has_codes == (v_kind != dense), "both caches hold codes, or none");
    using M = typename MathType<k_kind, T>::type;  // what the tensor cores multiply
    constexpr int copiers = has_codes ? 4 : 1;     // arrivals that fill a tile
    constexpr int few = has_codes         ? (HEAD > 128 ? 56 : 104)
                        : warpgroups == 2 ? 40
                                          : 32;  // registers of a thread that copies
    constexpr int many = has_codes         ? (HEAD > 128 ? 224 : 200)
                         : warpgroups == 2 ? 232
                                           : 160;  // and of one that multiplies
    constexpr int TURN = 4;  // named barriers: 1 + warpgroup for one alone, TURN + warpgroup for its turn
    // Whole swizzled tiles begin at multiples of 1024 bytes. With codes memory is short: no byte is left for aligning.
    extern __shared__ __align__(1024) uint8 shared[];
    uint32 q_at = (shared_address(shared) + 1023) & ~1023u;
    uint32 k_at = q_at + q_bytes, v_at = k_at + stages * tile_bytes, v_end = v_at + stages * tile_bytes;
    uint32 out_at = overlays ? q_at : v_end, codes_at = overlays ? v_end : v_end + q_bytes;
    uint32 q_full;
    if constexpr (has_codes) {
        q_full = codes_at + code_tile_bytes<k_kind, HEAD, tile_keys> + code_tile_bytes<v_kind, HEAD, tile_keys>;
    } else {
        __shared__ uint64 barriers[2 + 4 * stages];
        q_full = shared_address(barriers);
    }
    uint32 q_empty = q_full + 8, k_full = q_empty + 8, k_empty = k_full + 8 * stages;  // one for each place in a ring
    uint32 v_full = k_empty + 8 * stages, v_empty = v_full + 8 * stages;

    int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0),
        warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);
    int lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        barrier_init(q_empty, 4 * warpgroups);
        for (int i = 0; i < stages; i++) {
            barrier_init(k_full + 8 * i, copiers);
            barrier_init(v_full + 8 * i, copiers);
            barrier_init(k_empty + 8 * i, 4 * warpgroups);
            barrier_init(v_empty + 8 * i, 4 * warpgroups);
        }
        barrier_init_done();
    }
    __syncthreads();
    let_next_kernel_start();
    wait_for_previous_kernel();

    // The item of a turn. Heads of a group come one after the other: their keys are in L2. All lanes of a warp come here.
    int head, sequence, first_query, queries, first_row, length;
    auto find_item = [&](int turn) {
        int index = turn * gridDim.x + (turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        if (index >= items) return false;
        head = index % heads;
        index /= heads;
        if (query_starts) {  // tiles of all sequences, one sequence after the other
            auto row_at = [&](int b) { return min(max(query_starts[min(b, batch)], 0), rows); };
            for (int first = 0;; first += 32) {
                if (first >= batch) return false;
                int start = row_at(first + lane), count = max(row_at(first + lane + 1) - start, 0);
                int sum = (count + tile_rows - 1) / tile_rows;
                for (int by = 1; by < 32; by *= 2) {
                    int before = __shfl_up_sync(0xffffffffu, sum, by);
                    if (lane >= by) sum += before;
                }
                uint32 found = __ballot_sync(0xffffffffu, index < sum);
                if (found) {
                    int from = __ffs(found) - 1;
                    sequence = first + from;
                    first_row = __shfl_sync(0xffffffffu, start, from);
                    queries = __shfl_sync(0xffffffffu, count, from);
                    first_query = (__shfl_sync(0xffffffffu, sum, from) - 1 - index) * tile_rows;
                    break;
                }
                index -= __shfl_sync(0xffffffffu, sum, 31);
            }
        } else {
            queries = rows / batch;
            sequence = index % batch;
            first_row = sequence * queries;
            first_query = ((queries - 1) / tile_rows - index / batch) * tile_rows;
        }
        length = valid_length(kv_lengths, sequence, capacity);
        return true;
    };
    auto visible = [&](int query) { return visible_keys(query, queries, length, is_causal, window); };
    // Tiles begin .. end - 1 are seen by some query of the item.
    auto visible_tiles = [&] {
        KeyRange keys = {visible(first_query).begin, visible(min(first_query + tile_rows, queries) - 1).end};
        KeyRange tiles = {keys.begin / tile_keys, (keys.end + tile_keys - 1) / tile_keys};
        if (keys.end <= keys.begin) tiles.end = tiles.begin;
        return tiles;
    };

    if (warpgroup == warpgroups) {
        give_registers_back<few>();
        if constexpr (has_codes) {
            KeyRange tiles = {0, 0};
            int tile = 0, turn = 0;
            auto find_tile = [&] {
                CodeTile found = {};
                found.begins_item = tile <= tiles.begin;
                if (found.begins_item) {
                    do {
                        if (!find_item(turn++)) return found;
                        tiles = visible_tiles();
                    } while (tiles.end <= tiles.begin);
                    tile = tiles.end;
                }
                tile--;
                // Slots outside of these keys may hold anything, NaN included: zeros come in their place.
                int key = tile * tile_keys + warp * (tile_keys / 4) + lane;
                bool is_used = lane < tile_keys / 4 && key >= visible(0).begin && key < length;
                found.place = {sequence, key, is_used};
                if (block_table && is_used) {
                    int column = key >> (31 - __clz(page_size));
                    found.place = {block_table[(int64)sequence * max_pages + column], key & (page_size - 1), is_used};
                }
                found.is_found = true, found.kv_head = head / (heads / kv_heads);
                return found;
            };
            int query_row, query_head;
            auto note_queries = [&] { query_row = first_row + first_query, query_head = head; };
            uint32 q_parity = 1;
            auto load_queries = [&] {
                if (warp == 0 && lane == 0) {
                    barrier_wait(q_empty, q_parity);
                    barrier_arrive_expecting(q_full, q_bytes);
#pragma unroll
                    for (int block = 0; block < blocks; block++)
                        copy_box(q_at + block * q_block_bytes, &maps.q, block * 64, query_head, query_row, q_full);
                }
                q_parity ^= 1;
                __syncwarp();
            };
            CodeCaches caches = {k_codes, k_scales, v_codes, v_scales, kv_heads, page_size, pages};
            decode_tiles<k_kind, v_kind, HEAD, tile_keys, stages>(
                caches, codes_at, k_at, v_at, k_full, v_full, find_tile, note_queries, load_queries);
            return;
        }
        if (warp > 1) return;
        bool copies_keys = warp == 0;  // and the queries; the other warp values
        const TensorMap *map = copies_keys ? &maps.k : &maps.v;
        uint32 ring_at = copies_keys ? k_at : v_at;
        uint32 full_at = copies_keys ? k_full : v_full;
        uint32 empty_at = copies_keys ? k_empty : v_empty;
        if (lane == 0) {
            if (copies_keys) prefetch_tensor_map(&maps.q);
            prefetch_tensor_map(map);
            fence_bulk();
        }
        // Without a table the page is the sequence and tokens are their own places in it.
        int box_keys = block_table ? min(page_size, tile_keys) : tile_keys;
        int page_shift = block_table ? 31 - __clz(page_size) : 31;
        RingCursor<stages> cursor;
        uint32 q_parity = 1;
        for (int turn = 0; find_item(turn); turn++) {
            KeyRange tiles = visible_tiles();
            if (tiles.end <= tiles.begin || lane != 0) continue;
            int kv_head = head / (heads / kv_heads);
            for (int tile = tiles.end - 1; tile >= tiles.begin; tile--) {
                uint32 barrier = full_at + cursor.slot * 8, to = ring_at + cursor.slot * tile_bytes;
#pragma unroll 1
                for (int key = 0; key < tile_keys; key += box_keys) {
                    int token = tile * tile_keys + key, place = token, page = sequence;
                    if (block_table) {  // the page of unused tokens is one outside of the array, which reads as zeros
                        int column = token >> page_shift;
                        bool is_used = token < length && column < max_pages;
                        page = is_used ? block_table[(int64)sequence * max_pages + column] : pages;
                        if (is_used && (uint32)page >= (uint32)pages) page = 0;
                        place = token & (page_size - 1);
                    }
                    if (key == 0) {
                        barrier_wait(empty_at + cursor.slot * 8, cursor.parity ^ 1);
                        barrier_arrive_expecting(barrier, tile_bytes);
                    }
#pragma unroll
                    for (int block = 0; block < blocks; block++)
                        copy_box(
                            to + block * key_block_bytes + key * 128, map, block * 64, kv_head, place, page, barrier);
                }
                cursor.advance();
                if (tile < tiles.end - 1 || !copies_keys) continue;
                barrier = q_full;
                barrier_wait(q_empty, q_parity);
                q_parity ^= 1;
                barrier_arrive_expecting(barrier, q_bytes);
#pragma unroll
                for (int block = 0; block < blocks; block++)
                    copy_box(q_at + block * q_block_bytes, &maps.q, block * 64, head, first_row + first_query, barrier);
            }
        }
        return;
    }

    take_registers<many>();
    Logits logits(scale, has_softcap ? softcap : 0);
    RingCursor<stages> k_cursor, v_cursor;
    uint32 q_parity = 0;
    int group = lane / 4, t = lane % 4, warp_row = 64 * warpgroup + 16 * warp;  // of the item's queries
    uint32 q_descriptor = wgmma_descriptor(q_at + warpgroup * 64 * 128);
    uint32 k_descriptor = wgmma_descriptor(k_at);
    uint32 v_descriptor = wgmma_transposed_descriptor(v_at, key_block_bytes);
    auto arrive = [&](uint32 barrier) {  // for a warp whose products with it are done
        if (lane == 0) barrier_arrive(barrier);
    };
    if (takes_turns && warpgroup == warpgroups - 1) named_barrier_arrive(TURN, 256);  // the first turn is warpgroup 0's

    float scores[tile_keys / 2], acc[HEAD / 2];
    uint32 weights[tile_keys / 16][4];
    float top[2], sum[2], shrink[2];

    auto start_scores = [&] {
        uint32 k = k_descriptor + k_cursor.slot * (tile_bytes >> 4);
        wgmma_fence();
        wgmma_shared<M, tile_keys, false>(scores, wgmma_descriptor_of(q_descriptor), wgmma_descriptor_of(k));
#pragma unroll
        for (int step = 1; step < HEAD / 16; step++)
            wgmma_shared<M, tile_keys, true>(
                scores, wgmma_descriptor_of(q_descriptor + step / 4 * (q_block_bytes >> 4) + step % 4 * 2),
                wgmma_descriptor_of(k + step / 4 * (key_block_bytes >> 4) + step % 4 * 2));
        wgmma_commit();
    };
    auto start_sums = [&] {
        uint32 v = v_descriptor + v_cursor.slot * (tile_bytes >> 4);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < tile_keys / 16; step++) {
            if constexpr (HEAD == 96) {
                wgmma_add_transposed<M, 64>(acc, weights[step], wgmma_descriptor_of(v + step * 128));
                wgmma_add_transposed<M, 32, 32>(
                    acc, weights[step], wgmma_descriptor_of(v + (key_block_bytes >> 4) + step * 128));
            } else {
                wgmma_add_transposed<M, HEAD>(acc, weights[step], wgmma_descriptor_of(v + step * 128));
            }
        }
        wgmma_commit();
    };

    for (int turn = 0; find_item(turn); turn++) {
        KeyRange tiles = visible_tiles();
        int warp_first = first_query + warp_row;
        KeyRange earliest = visible(warp_first), latest = visible(warp_first + 15);
        const KeyRange seen[2] = {visible(warp_first + group), visible(warp_first + group + 8)};
        // Slots outside of these keys may hold anything, NaN included.
        KeyRange held = {visible(0).begin, capacity > length ? length : 0x7fffffff};
#pragma unroll
        for (int i = 0; i < HEAD / 2; i++) acc[i] = 0;
#pragma unroll
        for (int half = 0; half < 2; half++) top[half] = -infinity_float(), sum[half] = 0;

        // Scores to weights in fp32, and what earlier sums shrink by.
        auto softmax = [&](int tile) {
            int first = tile * tile_keys;
            if constexpr (has_softcap) {
#pragma unroll
                for (int i = 0; i < tile_keys / 2; i++) scores[i] = logits.capped(scores[i]);
            }
            if (first < latest.begin || first + tile_keys > earliest.end) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int begin = seen[half].begin - first - 2 * t, end = seen[half].end - first - 2 * t;
#pragma unroll
                    for (int n = 0; n < tile_keys / 8; n++)
#pragma unroll
                        for (int e = 0; e < 2; e++)
                            if (8 * n + e < begin || 8 * n + e >= end) scores[4 * n + 2 * half + e] = -infinity_float();
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float highest[2] = {scores[2 * half], scores[2 * half + 1]};
#pragma unroll
                for (int n = 1; n < tile_keys / 8; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) highest[e] = fmaxf(highest[e], scores[4 * n + 2 * half + e]);
                highest[0] = fmaxf(highest[0], highest[1]);
                highest[0] = fmaxf(highest[0], __shfl_xor_sync(0xffffffffu, highest[0], 1));
                highest[0] = fmaxf(highest[0], __shfl_xor_sync(0xffffffffu, highest[0], 2));
                float before = top[half];
                top[half] = fmaxf(before, highest[0]);
                // A row that has seen no key yet keeps minus infinity; zero in its place gives weights of 0, not NaN.
                float offset = top[half] == -infinity_float() ? 0 : top[half] * logits.multiplier;
                shrink[half] = exp2_fast(fmaf(before, logits.multiplier, -offset));
                float sums[2] = {sum[half] * shrink[half], 0};
#pragma unroll
                for (int n = 0; n < tile_keys / 8; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float &score = scores[4 * n + 2 * half + e];
                        score = exp2_fast(fmaf(score, logits.multiplier, -offset));
                        sums[e] += score;
                    }
                sum[half] = sums[0] + sums[1];
            }
        };
        auto pack = [&] {
#pragma unroll
            for (int step = 0; step < tile_keys / 16; step++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    weights[step][i] = pack_weights<M>(scores[8 * step + 2 * i], scores[8 * step + 2 * i + 1]);
        };
        auto rescale = [&] {
            if (!__any_sync(0xffffffffu, shrink[0] != 1 || shrink[1] != 1)) return;
#pragma unroll
            for (int i = 0; i < HEAD / 2; i++) acc[i] *= shrink[i / 2 % 2];
        };
        auto wait_for_values = [&](int tile) {
            barrier_wait(v_full + 8 * v_cursor.slot, v_cursor.parity);
            if constexpr (has_codes) return;  // whose unused slots were decoded as zeros
            int begin = held.begin - tile * tile_keys, end = held.end - tile * tile_keys;
            if (begin <= 0 && end >= tile_keys) return;
            // Zero what nobody sees: a weight of 0 does not undo a NaN. Each warpgroup does so for itself.
            uint32 at = v_at + v_cursor.slot * tile_bytes;
            for (int i = threadIdx.x % 128; i < tile_bytes / 16; i += 128) {
                int row = i / 8 % tile_keys;
                if (row < begin || row >= end) store_shared_16(at + i * 16, make_uint4(0, 0, 0, 0));
            }
            fence_bulk_shared();
            named_barrier(1 + warpgroup, 128);
        };

        if (tiles.end > tiles.begin) {
            int tile = tiles.end - 1;
            barrier_wait(q_full, q_parity);
            q_parity ^= 1;
            if constexpr (is_transformed<k_kind> || !is_same<M, T>) {
                prepare_queries<k_kind, T, HEAD>(q_at + warp_row * 128, q_block_bytes);
                fence_bulk_shared();
                named_barrier(1 + warpgroup, 128);
            }
            barrier_wait(k_full + 8 * k_cursor.slot, k_cursor.parity);
            start_scores();
            wgmma_wait<0>();
            settled(scores);
            arrive(k_empty + 8 * k_cursor.slot);
            k_cursor.advance();
            softmax(tile);
            pack();
            for (; tile > tiles.begin; tile--) {
                barrier_wait(k_full + 8 * k_cursor.slot, k_cursor.parity);
                if (takes_turns) named_barrier(TURN + warpgroup, 256);
                start_scores();
                wait_for_values(tile);
                start_sums();
                if (takes_turns) named_barrier_arrive(TURN + (warpgroup + 1) % warpgroups, 256);
                wgmma_wait<1>();
                settled(scores);
                arrive(k_empty + 8 * k_cursor.slot);
                k_cursor.advance();
                softmax(tile - 1);
                // Never so, but ptxas does not know: it would move the wait for the sums up, before the
                // weights are made. A store is what it does not move a wait across.
                if (sum[0] < 0 || sum[1] < 0) store_shared_4(out_at, 0);
                wgmma_wait<0>();
                settled(acc);
                arrive(v_empty + 8 * v_cursor.slot);
                v_cursor.advance();
                rescale();
                pack();
            }
            if constexpr (!overlays) arrive(q_empty);
            wait_for_values(tile);
            start_sums();
            wgmma_wait<0>();
            settled(acc);
            arrive(v_empty + 8 * v_cursor.slot);
            v_cursor.advance();
        }

        if (tiles.end <= tiles.begin) {  // no keys: the queries of another item may be on their way to shared memory
#pragma unroll 1
            for (int i = lane; i < HEAD * 2; i += 32) {
                int row = warp_first + i / (HEAD / 8), column = i % (HEAD / 8) * 8;
                if (row >= queries) continue;
                *(uint4 *)(out + ((int64)(first_row + row) * heads + head) * HEAD + column) = make_uint4(0, 0, 0, 0);
            }
            continue;
        }
        // Results to shared memory, as the queries lay there, then out in whole rows.
        if constexpr (overlays) named_barrier(1 + warpgroup, 128);  // no warp needs the queries any more
        uint32 own_at = out_at + warp_row * 128;
        if constexpr (is_transformed<v_kind>) transform_sums<v_kind>(acc);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[half] + __shfl_xor_sync(0xffffffffu, sum[half], 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            if (sinks) {
                float offset = top[half] == -infinity_float() ? 0 : top[half] * logits.multiplier;
                total += exp2_fast(fmaf(sinks[head], 1.4426950408889634f, -offset));
            }
            float inverse = inverse_sum(total) * (is_transformed<v_kind> ? 1.0f / 32 : 1.0f);
            int row = group + 8 * half, pair = v_kind == q4 ? t / 2 + t % 2 * 2 : t;
#pragma unroll
            for (int n = 0; n < HEAD / 8; n++) {
                float low = acc[4 * n + 2 * half] * inverse, high = acc[4 * n + 2 * half + 1] * inverse;
                if constexpr (v_kind == q4) join_neighbours(low, high);
                store_shared_4(
                    own_at + n / 8 * q_block_bytes + row * 128 + ((n % 8 ^ group) * 16 + 4 * pair),
                    pack_weights<T>(low, high));
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < HEAD / 16; i++) {
            int chunk = (i * 32 + lane) % (HEAD / 8), row = (i * 32 + lane) / (HEAD / 8);
            if (warp_first + row >= queries) continue;
            uint4 values = load_shared_16(own_at + chunk / 8 * q_block_bytes + row * 128 + (chunk % 8 ^ row % 8) * 16);
            *(uint4 *)(out + ((int64)(first_row + warp_first + row) * heads + head) * HEAD + chunk * 8) = values;
        }
        __syncwarp();  // before results of the next item are written there
        if constexpr (overlays) {
            fence_bulk_shared();
            __syncwarp();
            arrive(q_empty);
        }
    }
#endif
}
