// all_reduce_two_shot: y[i] = sum over ranks of x[i]: more bytes, between GPUs that can write each other's memory
//
// Work split  in each round a block takes ranks * piece units of 16 bytes. First shot: the r-th piece goes to rank r, which sums it;
//             second shot: it sends its sum to all. Block b exchanges with the blocks b of the others, 512 threads each.
// Numerics    fp32 sums in the order of the ranks, one rounding to T: the same bits on every rank.
// Limits      n the same on all ranks; piece <= capacity; y may be x; up to 8 ranks.
// Traffic     2 * n * sizeof(T) * (ranks - 1) / ranks bytes sent by NVLink and as many received
// Reference   cupyq/ops/all_reduce.py: all_reduce_reference. The protocol: all_reduce.cuh
#include "all_reduce.cuh"

template <typename T, int ranks, bool is_aligned>
__global__ void __launch_bounds__(512, 1) all_reduce_two_shot(
    const T *x,                               // [n]
    T *y,                                     // [n]
    const __grid_constant__ PeerTable peers,  // of its pieces
    int64 n, int piece) {
    constexpr int count = 16 / sizeof(T);
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (n == 0) return;  // launched to be loaded
    Exchange<ranks> exchange(peers, 2);
    int64 units = (n + count - 1) / count, turn = (int64)gridDim.x * ranks * piece;

    for (int64 begin = (int64)blockIdx.x * ranks * piece; begin - (int64)blockIdx.x * ranks * piece < units;
        begin += turn) {
        // For this thread's share of rank r's piece: use(load(unit of y, place in its piece, is it whole), the same three), of
        // `held` units first all loads and then all uses.
        auto each_unit = [&](int r, auto held, auto load, auto use) {
            constexpr int many = decltype(held)::value, step = 512 * many;
            int64 start = begin + (int64)r * piece, whole = n / count - start;
            int end = (int)max((int64)0, min((int64)piece, whole));
            for (int first = threadIdx.x; first < end; first += step) {
                decltype(load(start, first, Known<true>())) values[many];
#pragma unroll
                for (int h = 0; h < many; h++)
                    if (int place = first + 512 * h; place < end) values[h] = load(start + place, place, Known<true>());
#pragma unroll
                for (int h = 0; h < many; h++)
                    if (int place = first + 512 * h; place < end) use(values[h], start + place, place, Known<true>());
            }
            if (n % count && whole >= 0 && whole < piece && threadIdx.x == 0)
                use(load(start + whole, (int)whole, Known<false>()), start + whole, (int)whole, Known<false>());
        };
        auto next = [&](int r) { return peers.rank + r < ranks ? peers.rank + r : peers.rank + r - ranks; };
        auto mine = [&](int64 unit, int place, auto is_whole) {
            return take<is_aligned, count, is_whole.value>(x, unit * count, n);
        };
#pragma unroll 1
        for (int r = 1; r < ranks; r++) {
            int to = next(r);
            uint4 *outbox = exchange.piece(to, 0, peers.rank);
            each_unit(
                to, Known<(ranks <= 4 ? 4 : 2)>(), mine,
                [&](Vector<T, count> values, int64 unit, int place, auto is_whole) {
                    outbox[place] = *(uint4 *)&values;
                });
        }
        exchange.meet(0);
        struct Parts {
            ulonglong2 received[ranks];
            Vector<T, count> own;
        };
        auto all = [&](int64 unit, int place, auto is_whole) {
            Parts parts;
#pragma unroll
            for (int r = 0; r < ranks; r++)
                if (r != peers.rank)
                    parts.received[r] = load_words((ulonglong2 *)exchange.piece(peers.rank, 0, r) + place);
            parts.own = mine(unit, place, is_whole);
            return parts;
        };
        each_unit(
            peers.rank, Known<(ranks == 2 ? 2 : 1)>(), all, [&](Parts parts, int64 unit, int place, auto is_whole) {
                float sums[count];
#pragma unroll
                for (int r = 0; r < ranks; r++) {
                    auto values = r == peers.rank ? parts.own : *(Vector<T, count> *)&parts.received[r];
#pragma unroll
                    for (int i = 0; i < count; i++)
                        sums[i] = r == 0 ? to_float(values[i]) : sums[i] + to_float(values[i]);
                }
                Vector<T, count> total;
#pragma unroll
                for (int i = 0; i < count; i++) total[i] = from_float<T>(sums[i]);
#pragma unroll(ranks <= 4 ? ranks : 1)
                for (int r = 1; r < ranks; r++) exchange.piece(next(r), 1, peers.rank)[place] = *(uint4 *)&total;
                put<is_aligned, count, is_whole.value>(y, unit * count, n, total);
            });
        exchange.meet(1);
#pragma unroll 1
        for (int r = 1; r < ranks; r++) {
            int from = next(r);
            const ulonglong2 *inbox = (const ulonglong2 *)exchange.piece(peers.rank, 1, from);
            auto sums = [&](int64 unit, int place, auto is_whole) { return load_words(inbox + place); };
            each_unit(
                from, Known<(ranks <= 4 ? 4 : 2)>(), sums, [&](ulonglong2 words, int64 unit, int place, auto is_whole) {
                    put<is_aligned, count, is_whole.value>(y, unit * count, n, *(Vector<T, count> *)&words);
                });
        }
        exchange.epoch++;
    }
    exchange.finish();
}
