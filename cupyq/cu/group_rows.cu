// group_rows: the pairs of a row and one of its experts, sorted by expert (stable), and cut into tiles of up to tile_rows
//
// Work split  one thread block per expert. Each counts the pairs of every expert in shared memory (integers: the order does not
//             matter), so it knows where its own begin; then it goes through all pairs in order and keeps its own. No
//             block waits for another.
// Numerics    integers.
// Limits      experts <= 1024; none on pairs. Pairs whose expert is not 0 .. experts - 1 are left out: the end of `order`
//             is then not written.
// Traffic     2 * experts * pairs * 4 bytes from L2
// Reference   cupyq/ops/routing.py: group_rows_reference
#include "matrix.cuh"
#include "ptx.cuh"

constexpr int MOST_EXPERTS = 1024, THREADS = 512;

__global__ void __launch_bounds__(THREADS) group_rows(
    const int *expert_of,  // [pairs]
    int *order,            // [pairs]
    int *offsets,          // [experts + 1]: pairs of expert e are order[offsets[e] .. offsets[e + 1])
    RowTile *tiles,        // [most_tiles]
    int pairs, int tile_rows, int most_tiles) {
    __shared__ int count[MOST_EXPERTS];
    __shared__ int begin, first_tile;       // pairs and tiles of the experts before this one
    __shared__ int found[2][THREADS / 32];  // own pairs in each warp's share of a run of THREADS pairs
    let_next_kernel_start();
    wait_for_previous_kernel();
    int expert = blockIdx.x, experts = gridDim.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    for (int e = threadIdx.x; e < experts; e += THREADS) count[e] = 0;
    if (threadIdx.x == 0) begin = first_tile = 0;
    __syncthreads();
    for (int64 p = threadIdx.x; p < pairs; p += THREADS) {
        int e = expert_of[p];
        if (e >= 0 && e < experts) atomicAdd(&count[e], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < expert; e += THREADS) {
        atomicAdd(&begin, count[e]);
        atomicAdd(&first_tile, (count[e] + tile_rows - 1) / tile_rows);
    }
    __syncthreads();

    int own = count[expert], own_tiles = (own + tile_rows - 1) / tile_rows;
    if (threadIdx.x == 0) {
        offsets[expert] = begin;
        if (expert == experts - 1) offsets[experts] = begin + own;
    }
    for (int t = threadIdx.x; t < own_tiles; t += THREADS)
        tiles[first_tile + t] = {expert, begin + t * tile_rows, min(tile_rows, own - t * tile_rows)};
    if (expert == experts - 1)
        for (int t = first_tile + own_tiles + threadIdx.x; t < most_tiles; t += THREADS) tiles[t] = {-1, 0, 0};

    int written = 0, buffer = 0;
    for (int64 run = 0; run < pairs && written < own; run += THREADS, buffer ^= 1) {
        int64 p = run + threadIdx.x;
        bool is_own = p < pairs && expert_of[p] == expert;
        uint32 lanes = __ballot_sync(0xffffffffu, is_own);
        if (lane == 0) found[buffer][warp] = __popc(lanes);
        __syncthreads();  // one barrier a run is enough: the next run writes the other buffer
        int before = 0, all = 0;
        for (int w = 0; w < THREADS / 32; w++) {
            if (w < warp) before += found[buffer][w];
            all += found[buffer][w];
        }
        if (is_own) order[begin + written + before + __popc(lanes & (1u << lane) - 1)] = p;
        written += all;
    }
}
