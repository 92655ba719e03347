// Who computes what in attention_decode: the keys of all sequences as one row of tiles, cut into shares of equal length.
//
// An item is 16 rows of the queries * group of a kv head, and its tiles are the tiles of keys that some query of the sequence
// sees. Items stand in a row in the order (sequence, row tile). Block i computes head i % kv_heads of share i / kv_heads of all
// their tiles: the end of one item, whole items, the beginning of another, each a Segment. So neighbouring blocks read the same
// tokens at about the same time, and the heads of a token lie side by side in memory. (For matrix products this is called
// stream-K: Osama et al., "Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix Multiplication",
// arxiv.org/abs/2301.03598.)
#pragma once
#include "kv_tile.cuh"

// The queries and keys of one sequence.
struct Sequence {
    int first_row, queries;  // rows of q, over its heads
    int length;              // valid keys
    int begin, end;          // keys that some query sees; tiles start at multiples of tile_keys
    int tiles, row_tiles;    // of an item: at least 1, as its rows of out are written; 0 and 0 without queries
};

// Tiles of one item that a block computes. All zeros: none.
struct Segment {
    int b, row_tile, kv_head;  // the item
    int share;
    int first, count;  // which of its tiles
    int rest;          // tiles of the share after these
    int item_begin;    // of the item, among the tiles of all items
    int share_tiles;   // the length of every share
    Sequence sequence;

    __device__ __forceinline__ bool is_whole() const { return count == sequence.tiles; }
    // Whether the same is to be done: the other numbers follow from these.
    __device__ __forceinline__ bool operator==(const Segment &o) const {
        return b == o.b && row_tile == o.row_tile && first == o.first && count == o.count &&
               item_begin == o.item_begin && share_tiles == o.share_tiles &&
               sequence.first_row == o.sequence.first_row && sequence.queries == o.sequence.queries &&
               sequence.length == o.sequence.length;
    }
};

// What tables say of a sequence.
struct Entry {
    int first_row, queries, length;
    __device__ __forceinline__ bool operator==(const Entry &o) const {
        return first_row == o.first_row && queries == o.queries && length == o.length;
    }
};

struct Shares {
    const int *kv_lengths;    // [batch] or null: all of capacity
    const int *query_starts;  // [batch + 1] or null
    int batch, most_queries, group, kv_heads, capacity, is_causal, window;
    int most;         // shares in all; 0: no item is split, and block i computes head i % kv_heads of item i / kv_heads
    int least_tiles;  // of a share, where an item has so many
    int part_rows;    // of what a segment leaves behind

    // Of sequence b; no queries where there is none. Tables are read past L1, as some are read before the kernel that may write
    // them has ended, and then again.
    __device__ __forceinline__ Entry entry(int b) const {
        if (b >= batch) return {};
        int start = b * most_queries, end = start + most_queries;
        if (query_starts) {  // whatever the table says, rows stay inside of q
            start = min(max(__ldcg(query_starts + b), 0), most_queries);
            end = min(max(__ldcg(query_starts + b + 1), start), most_queries);
        }
        return {start, end - start, kv_lengths ? min(max(__ldcg(kv_lengths + b), 0), capacity) : capacity};
    }
    // Of the sequence of this lane's number; of the only one.
    __device__ __forceinline__ Entry own_entry() const { return entry(batch == 1 ? 0 : threadIdx.x % 32); }

    __device__ __forceinline__ Sequence sequence(Entry e) const {
        Sequence s = {e.first_row, e.queries, e.length};
        s.begin = min(visible_keys(0, e.queries, e.length, is_causal, window).begin, e.length), s.end = e.length;
        s.row_tiles = (e.queries * group + 15) / 16;
        s.tiles = e.queries > 0 ? max((s.end + tile_keys - 1) / tile_keys - s.begin / tile_keys, 1) : 0;
        return s;
    }

    __device__ __forceinline__ int work(const Sequence &s) const { return s.tiles * s.row_tiles; }

    // The length of a share. The last bound weighs what parts cost: T tiles of an item take time / S of shares running at once,
    // and T / S parts of its rows are then added. 45: measured on an H100, about.
    __device__ __forceinline__ int share_tiles(int work, int longest) const {
        int even = (uint32)(work + most - 1) / (uint32)most;
        int cheap = (int)ceilf(sqrt_fast((float)(longest * part_rows) * (1 / 45.0f)));
        return max(max(even, min(least_tiles, longest)), cheap);
    }

    // What a block computes first. All warps find it alike, a sequence per lane; all lanes of a warp must call together.
    // mine: own_entry().
    __device__ __forceinline__ Segment first_segment(uint32 block, Entry mine) const {
        Segment s = {};
        s.share = block / (uint32)kv_heads, s.kv_head = block - s.share * kv_heads;
        if (most == 0) {
            int row_tiles = (most_queries * group + 15) / 16;
            s.b = (uint32)s.share / (uint32)row_tiles, s.row_tile = s.share - s.b * row_tiles;
            s.sequence = sequence(entry(s.b));
            if (s.row_tile < s.sequence.row_tiles) s.count = s.sequence.tiles;
            return s;
        }
        bool is_single = batch == 1;  // then nothing is to be exchanged between lanes
        int lane = threadIdx.x % 32;
        Sequence own = sequence(mine);
        int all = work(own), longest = own.tiles;
        if (!is_single) {
#pragma unroll 2
            for (int b = lane + 32; b < batch; b += 32) {
                Sequence other = sequence(entry(b));
                all += work(other), longest = max(longest, other.tiles);
            }
            for (int lanes = 16; lanes > 0; lanes /= 2) {
                all += __shfl_xor_sync(0xffffffffu, all, lanes);
                longest = max(longest, __shfl_xor_sync(0xffffffffu, longest, lanes));
            }
        }
        s.share_tiles = share_tiles(all, longest);
        if ((int64)s.share * s.share_tiles >= all) return s;
        s.item_begin = s.share * s.share_tiles;  // of the share, until its item is known
        int place = s.item_begin;                // among the tiles of its sequence
        if (is_single) {
            s.sequence = own;
        } else {
#pragma unroll 1
            for (int base = 0;; base += 32) {
                if (base >= batch) return s;  // lengths that changed meanwhile: this will be found again
                if (base > 0) mine = entry(base + lane), own = sequence(mine);
                int sum = work(own);
                for (int step = 1; step < 32; step *= 2) {
                    int others = __shfl_up_sync(0xffffffffu, sum, step);
                    if (lane >= step) sum += others;
                }
                uint32 reached = __ballot_sync(0xffffffffu, place < sum);
                int owner = reached ? __ffs(reached) - 1 : 31;
                int before = __shfl_sync(0xffffffffu, reached ? sum - work(own) : sum, owner);
                place -= before;
                if (!reached) continue;
                s.b = base + owner;
                s.sequence = sequence(
                    {__shfl_sync(0xffffffffu, mine.first_row, owner), __shfl_sync(0xffffffffu, mine.queries, owner),
                        __shfl_sync(0xffffffffu, mine.length, owner)});
                break;
            }
        }
        s.row_tile = (uint32)place / (uint32)s.sequence.tiles;
        s.first = place - s.row_tile * s.sequence.tiles, s.item_begin -= s.first;
        s.count = min(s.sequence.tiles - s.first, s.share_tiles), s.rest = s.share_tiles - s.count;
        return s;
    }

    // What a block computes after segment s: count = 0 for nothing.
    __device__ __forceinline__ Segment next_segment(Segment s) const {
        s.item_begin += s.sequence.tiles, s.first = s.count = 0;
        if (s.rest == 0) return s;
        s.row_tile++;
        while (s.row_tile == s.sequence.row_tiles) {
            if (++s.b == batch) return s;
            s.row_tile = 0, s.sequence = sequence(entry(s.b));
        }
        s.count = min(s.sequence.tiles, s.rest), s.rest -= s.count;
        return s;
    }
};

// Where the segments of an item that is split leave their parts, and which of them is this block's. A block has two slots: the
// first is its first segment's, the other is for an item that begins after another has ended, and goes on in the next share.
struct ItemParts {
    int first_block, index, count;  // this block's is part `index` of `count`
    int first_slot;                 // 0 or 1
    int stride;                     // slots from one share's part to the next one's
    __device__ __forceinline__ ItemParts(const Segment &s, int kv_heads) {
        int first_share = (uint32)s.item_begin / (uint32)s.share_tiles;
        index = s.share - first_share, first_block = first_share * kv_heads + s.kv_head, stride = 2 * kv_heads;
        count = (uint32)(s.item_begin + s.sequence.tiles - 1) / (uint32)s.share_tiles - first_share + 1;
        first_slot = s.item_begin != first_share * s.share_tiles;
    }
    // Counted from the first slot of the item's first block.
    __device__ __forceinline__ int slot(int i) const { return i ? i * stride : first_slot; }
};

// Arrive at a counter, as one of `count` -> whether all others have. The last one leaves 0 again. What the blocks wrote before
// the __syncthreads() before one of their threads arrived is there for all threads of the last block after its next one.
__device__ __forceinline__ bool arrives_last(uint32 *counter, int count) {
    uint32 before;
    asm volatile("atom.inc.acq_rel.gpu.global.u32 %0, [%1], %2;"
        : "=r"(before)
        : "l"(__cvta_generic_to_global(counter)), "r"(count - 1)
        : "memory");
    return before == count - 1;
}
