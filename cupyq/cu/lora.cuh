// Which of the concatenated rank columns one request uses: both LoRA kernels leave out all others.
#pragma once
#include "reduce.cuh"

constexpr int LORA_THREADS = 128;
constexpr int LORA_WINDOW = 1024;  // rank columns looked at in one go: 8 of each thread

// The rows one thread block works on. They belong to one request, so that one list of columns serves all of them.
struct LoraRows {
    int request, first, count;
};

// Tile number `tile`, where every request's `seq` rows are cut into tiles of tile_rows.
template <int tile_rows> __device__ __forceinline__ LoraRows lora_rows(int tile, int seq) {
    int tiles = (seq + tile_rows - 1) / tile_rows, request = tile / tiles, within = tile % tiles * tile_rows;
    return {request, request * seq + within, min(tile_rows, seq - within)};
}

// Lists, in ascending order, the groups of `width` neighbouring columns of [first, first + LORA_WINDOW) in which any column's
// adapter has a weight other than 0; returns how many there are. Group g begins at column first + g * width. Adapter numbers
// out of range count as unused. Every thread of the block calls it; it begins and ends with a barrier.
template <int width> __device__ __forceinline__ int list_active(
    const int *rank_adapter,  // [ranks]
    const float *weights,     // [adapters], of the request
    int adapters, int ranks, int first,
    int *list,      // [LORA_WINDOW / width], shared
    int *counts) {  // [32], shared
    constexpr int rounds = LORA_WINDOW / width / LORA_THREADS, warps = LORA_THREADS / 32;
    static_assert(rounds >= 1 && rounds * warps <= 32, "one lane per count");
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32 votes[rounds];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < rounds; i++) {
        int column = first + (i * LORA_THREADS + (int)threadIdx.x) * width;
        bool is_active = false;
        for (int c = 0; c < width; c++)
            if (column + c < ranks) {
                uint32 adapter = rank_adapter[column + c];
                if (adapter < (uint32)adapters) is_active |= weights[adapter] != 0;
            }
        votes[i] = __ballot_sync(0xffffffffu, is_active);
        if (lane == 0) counts[i * warps + warp] = __popc(votes[i]);
    }
    __syncthreads();
    int before = lane < rounds * warps ? counts[lane] : 0;  // inclusive sums, one lane per (round, warp)
    for (int step = 1; step < 32; step *= 2) {
        int lower = __shfl_up_sync(0xffffffffu, before, step);
        if (lane >= step) before += lower;
    }
#pragma unroll
    for (int i = 0; i < rounds; i++) {
        int end = __shfl_sync(0xffffffffu, before, i * warps + warp);
        int at = end - __popc(votes[i] >> lane);  // the votes of this lane and of those above it
        if (votes[i] >> lane & 1) list[at] = i * LORA_THREADS + threadIdx.x;
    }
    __syncthreads();
    return __shfl_sync(0xffffffffu, before, 31);
}
