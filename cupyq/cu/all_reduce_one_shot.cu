// all_reduce_one_shot: y[i] = sum over ranks of x[i]: few bytes, between GPUs that can write each other's memory
//
// Work split  8 bytes a thread and turn, 256 threads a block; block and thread of every rank exchange with the same of the others.
// Numerics    fp32 sums in the order of the ranks, one rounding to T: the same bits on every rank.
// Limits      n <= gridDim.x * capacity * 8 / sizeof(T), the same on all ranks; y may be x; up to 8 ranks.
// Traffic     2 * n * sizeof(T) * (ranks - 1) bytes sent by NVLink and as many received
// Reference   cupyq/ops/all_reduce.py: all_reduce_reference. The protocol: all_reduce.cuh
#include "all_reduce.cuh"

template <typename T, int ranks, bool is_aligned>
__global__ void __launch_bounds__(256) all_reduce_one_shot(
    const T *x,                               // [n]
    T *y,                                     // [n]
    const __grid_constant__ PeerTable peers,  // of its letters
    int64 n) {
    constexpr int count = 8 / sizeof(T);
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (n == 0) return;  // launched to be loaded
    Exchange<ranks> exchange(peers, 0);
    int units = (int)((n + count - 1) / count), turn = gridDim.x * 256, begin = blockIdx.x * 256 + threadIdx.x;
    auto mine = [&](int unit) {
        auto values = take<is_aligned, count>(x, (int64)unit * count, n);
        return *(uint2 *)&values;
    };
    int place = threadIdx.x;  // among the letters of the block
    for (int unit = begin; unit < units; unit += turn, place += 256) exchange.send(place, mine(unit));
    place = threadIdx.x;
    for (int unit = begin; unit < units; unit += turn, place += 256) {
        auto total = exchange.template sum<T>(place, mine(unit));
        put<is_aligned, count>(y, (int64)unit * count, n, total);
    }
    exchange.clear_old_letters((units + turn - 1) / turn * 256);
    exchange.epoch++;
    exchange.finish();
}
