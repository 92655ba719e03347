// all_reduce_norm: x[r, c] = sum over ranks of x[r, c];  y[r, c] = x[r, c] * w[c] / sqrt(mean_c(x[r, c]^2) + eps)
//                  is_ordered: y[r, j] = x[r, c] * w[c] / sqrt(mean_c(x[r, c]^2) + eps) with c = order[j]; 0 where order[j] is no column
//
// Work split  a cluster of 8 blocks for each row: block b exchanges the b-th eighth of its columns with the blocks of the same
//             number on the other ranks, two values a thread and turn, keeps x * w of them in shared memory, and writes the b-th
//             eighth of y, of values from wherever in the cluster they are.
// Numerics    x: fp32 sums in the order of the ranks. y: squares are summed in fp32 in a fixed order, by threads, warps and then
//             those of the cluster, which is not the order of rms_norm.cu; (x * w) * rsqrt, one rounding at the store. The
//             same bits on every run, and on all ranks, as x is the same there.
// Limits      sm_90 or newer. 8 * rows <= blocks of the letters; dim a multiple of 16, up to 16384 and 16 * capacity; any count;
//             x, w and, unordered, y start at a multiple of two of their values; y apart from x.
// Traffic     8 * rows * dim * (ranks - 1) bytes sent by NVLink and as many received
// Reference   cupyq/ops/all_reduce.py: all_reduce_norm_reference. The protocol: all_reduce.cuh
#include "all_reduce.cuh"
#include "cluster.cuh"
#include "norm.cuh"

constexpr int SHARERS = 8, THREADS = 512, WARPS = THREADS / 32;  // blocks of a row; what is in a block
constexpr int TURNS = 2, UNITS = TURNS * THREADS;                // of 8 bytes, the most of a block
static_assert(SHARERS * WARPS == 4 * 32, "a lane takes the sums of four warps");

template <typename W, typename Y, int ranks, bool is_ordered>
CLUSTER_OF_8 __global__ void __launch_bounds__(THREADS, 1) all_reduce_norm(
    float *x,                                 // [rows, dim]
    const W *w,                               // [dim]
    const int *order,                         // [count], null where not is_ordered
    Y *y,                                     // [rows, dim], or [rows, count] where is_ordered
    const __grid_constant__ PeerTable peers,  // of its letters
    int dim, int count, float eps) {
#if __CUDA_ARCH__ < 900
    __trap();
#else
    using Pair = Vector<float, 2>;
    constexpr int held = 4;
    constexpr uint32 nowhere = ~0u;
    __shared__ Pair products[UNITS];              // x * w of this block's columns
    alignas(16) __shared__ float squares[WARPS];  // of each warp's
    int thread = threadIdx.x, sharer = blockIdx.x % SHARERS, row = blockIdx.x / SHARERS;
    int columns = dim / SHARERS, units = columns / 2, share = (count + SHARERS - 1) / SHARERS;
    int begin = sharer * share + thread, end = min(count, (sharer + 1) * share);  // of y, in its order
    const W *own_w = w + sharer * columns;
    prefetch_row<2 * THREADS>(own_w, 2 * thread, columns);
    if (is_ordered) prefetch_row<THREADS>(order, begin, end);
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (dim == 0) return;  // launched to be loaded
    Exchange<ranks> exchange(peers, 1);
    float *own_x = x + (int64)row * dim + sharer * columns;
    auto each_unit = [&](auto body) {  // body(unit, turn)
#pragma unroll
        for (int t = 0; t < TURNS; t++)
            if (int unit = thread + t * THREADS; unit < units) body(unit, t);
    };
    // Where in the cluster x * w of a column is.
    auto source = [&](uint32 column) {
        uint32 block = column / (uint32)columns;
        return column < (uint32)dim ? cluster_address((float *)products + (column - block * columns), block) : nowhere;
    };

    uint2 mine[TURNS];
    Vector<W, 2> ws[TURNS];
    uint32 sources[held];  // first the columns themselves: all loads, then what uses them
    each_unit([&](int unit, int t) { mine[t] = *(const uint2 *)(own_x + 2 * unit); });
    each_unit([&](int unit, int t) { ws[t] = *(const Vector<W, 2> *)(own_w + 2 * unit); });
    if constexpr (is_ordered)
        each_column<THREADS, held>(begin, end, [&](int j, int h) {
            if (h < held) sources[h] = order[j];
        });
    each_unit([&](int unit, int t) { exchange.send(unit, mine[t]); });
    if constexpr (is_ordered)
        each_column<THREADS, held>(begin, end, [&](int j, int h) {
            if (h < held) sources[h] = source(sources[h]);
        });

    Pair values[TURNS];
    float sum = 0;
    each_unit([&](int unit, int t) {
        auto total = exchange.template sum<float>(unit, mine[t]);
        *(Pair *)(own_x + 2 * unit) = total;
        for (int i = 0; i < 2; i++) {
            sum += total[i] * total[i];
            values[t][i] = total[i] * to_float(ws[t][i]);
        }
        if (is_ordered) products[unit] = values[t];
    });
    sum = warp_sum(sum);
    if (thread % 32 == 0) squares[thread / 32] = sum;
    __syncwarp();
    arrive_and_publish_in_cluster();
    wait_for_cluster();

    float picked[held];
    if constexpr (is_ordered)
        each_column<THREADS, held>(begin, end, [&](int j, int h) {
            if (h < held && sources[h] != nowhere) picked[h] = load_from_cluster(sources[h]);
        });
    float4 four = load_four_from_cluster(cluster_address(squares + thread % 4 * 4, thread % 32 / 4));
    float scale = 1.0f / sqrtf(warp_sum(four.x + four.y + (four.z + four.w)) / dim + eps);
    if constexpr (is_ordered) {
        each_column<THREADS, held>(begin, end, [&](int j, int h) {
            uint32 from = h < held ? sources[h] : source(order[j]);
            float value = from == nowhere ? 0 : (h < held ? picked[h] : load_from_cluster(from)) * scale;
            y[(int64)row * count + j] = from_float<Y>(value);
        });
    } else {
        each_unit([&](int unit, int t) {
            Vector<Y, 2> ys;
            for (int i = 0; i < 2; i++) ys[i] = from_float<Y>(values[t][i] * scale);
            *(Vector<Y, 2> *)(y + (int64)row * dim + sharer * columns + 2 * unit) = ys;
        });
    }
    __syncwarp();
    arrive_in_cluster();  // what this thread has read of other blocks is there, as it was used
    exchange.clear_old_letters(units);
    exchange.epoch++;
    exchange.finish();
    __syncwarp();
    wait_for_cluster();  // and their shared memory may go
#endif
}
