// all_reduce_norm: residual[r, c] += sum over ranks of x[r, c];  y[r, c] = residual[r, c] * w[c] / sqrt(mean_c(residual[r, c]^2) + eps)
//
// Work split  a block of 32 * warps threads for each row; `vector` values of the row per access.
// Numerics    those of all_reduce_one_shot.cu, which adds to the residual, and then of rms_norm.cu, bit by bit: warps and vector,
//             which decide about the order of sums, must be those of rms_norm.
// Limits      rows <= blocks of the letters; dim a multiple of vector with dim * sizeof(T) / 8 <= capacity; 8 bytes of T at least
//             in a vector; y apart from x and residual.
// Traffic     2 * rows * dim * sizeof(T) * (ranks - 1) bytes sent by NVLink and as many received
// Reference   cupyq/ops/all_reduce.py: all_reduce_norm_reference. The protocol: all_reduce.cuh
#include "all_reduce.cuh"
#include "norm.cuh"

template <typename T, typename R, typename W, typename Y, int vector, int warps, int ranks>
__global__ void __launch_bounds__(32 * warps, 1) all_reduce_norm(
    const T *x,                               // [rows, dim]
    R *residual,                              // [rows, dim]
    const W *w,                               // [dim]
    Y *y,                                     // [rows, dim]
    const __grid_constant__ PeerTable peers,  // of its letters
    int dim, float eps) {
    constexpr int step = 32 * warps * vector, held = vector == 8 ? 2 : 4, count = 8 / sizeof(T), units = vector / count;
    static_assert(vector % count == 0, "a vector holds whole units");
    __shared__ float partial[warps];
    int first = threadIdx.x * vector;
    prefetch_row<step>(w, first, dim);
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (dim == 0) return;  // launched to be loaded
    Exchange<ranks> exchange(peers, 1);
    const T *x_row = x + (int64)blockIdx.x * dim;
    R *residual_row = residual + (int64)blockIdx.x * dim;
    auto mine = [&](int c, int u) { return *(const uint2 *)(x_row + c + u * count); };

    for (int c = first; c < dim; c += step)
#pragma unroll
        for (int u = 0; u < units; u++) exchange.send(c / count + u, mine(c, u));

    Vector<R, vector> kept[held];
    float sum = 0;
    each_column<step, held>(first, dim, [&](int c, int h) {
        auto values = *(const Vector<R, vector> *)(residual_row + c);
#pragma unroll
        for (int u = 0; u < units; u++) {
            auto total = exchange.template sum<T>(c / count + u, mine(c, u));
#pragma unroll
            for (int i = 0; i < count; i++)
                values[u * count + i] = from_float<R>(to_float(values[u * count + i]) + to_float(total[i]));
        }
        *(Vector<R, vector> *)(residual_row + c) = values;
        if (h < held) kept[h] = values;
        for (int i = 0; i < vector; i++) sum += to_float(values[i]) * to_float(values[i]);
    });
    float scale = 1.0f / sqrtf(block_sum<warps>(sum, partial) / dim + eps);
    each_column<step, held>(first, dim, [&](int c, int h) {
        auto values = h < held ? kept[h] : *(const Vector<R, vector> *)(residual_row + c);
        auto ws = *(const Vector<W, vector> *)(w + c);
        Vector<Y, vector> ys;
        for (int i = 0; i < vector; i++) ys[i] = from_float<Y>(to_float(values[i]) * to_float(ws[i]) * scale);
        *(Vector<Y, vector> *)(y + (int64)blockIdx.x * dim + c) = ys;
    });
    exchange.clear_old_letters(dim / count);
    exchange.epoch++;
    exchange.finish();
}
