// lora_expand: y[r, c] += sum_j (weight[r, adapter of j] * sum_s partial[s, r, j]) * b[j, c]
//
// Work split  a thread block takes tile_rows rows of one request and walks over the rank columns whose adapter the request uses;
//             the others are not read, and rows that use none are left as they are. One row (decoding): each warp takes every
//             fourth rank column for the same 32 * vector columns of y. 16 rows: 128 * vector columns, a value of b serves 16 rows.
// Numerics    fp32: slices in order, times the weight, then one fmaf per rank in order (one row: the warps' sums in order), one
//             addition to y and one rounding at the store.
// Limits      any rows, n and ranks; vector divides n.
// Traffic     2 * rows * n * sizeof(Y) + n * (ranks in use) * sizeof(T) + 4 * slices * rows * (ranks in use) bytes; b and partial are
//             read again by every row tile and column tile, from L2.
// Reference   cupyq/ops/lora.py: lora_reference
#include "lora.cuh"

template <typename T, typename Y, int vector, int tile_rows>
__global__ void __launch_bounds__(LORA_THREADS, tile_rows == 1 ? 8 : 3) lora_expand(
    const float *partial,     // [slices, rows, ranks]
    const T *b,               // [ranks, n]
    const int *rank_adapter,  // [ranks]
    const float *weights,     // [rows / seq, adapters]
    Y *y,                     // [rows, n]
    int rows, int seq, int n, int ranks, int adapters, int slices, int column_tiles) {
    constexpr int splits = tile_rows == 1 ? LORA_THREADS / 32 : 1, threads = LORA_THREADS / splits;
    constexpr int staged = tile_rows == 1 ? 128 : 32;           // rank columns whose t is in shared memory at a time
    constexpr int stride = tile_rows == 1 ? 1 : tile_rows + 4;  // fewer bank conflicts, still 16-byte aligned
    __shared__ int list[LORA_WINDOW], counts[32];
    __shared__ alignas(16) float t[staged * stride];
    __shared__ float handed[splits][threads][vector];

    LoraRows tile = lora_rows<tile_rows>(blockIdx.x / column_tiles, seq);
    int column = (blockIdx.x % column_tiles * threads + threadIdx.x % threads) * vector, split = threadIdx.x / threads;
    const float *request_weights = weights + (int64)tile.request * adapters;

    auto stage_t = [&](int window, int begin, int count) {
        for (int i = threadIdx.x; i < staged * tile_rows; i += LORA_THREADS) {
            int j = i % staged, m = i / staged;
            if (begin + j >= count) continue;
            int rank = window + list[begin + j];
            float sum = 0;
            if (m < tile.count) {
                const float *source = partial + (int64)(tile.first + m) * ranks + rank;
#pragma unroll 8
                for (int s = 0; s < slices; s++) sum += source[(int64)s * rows * ranks];
                sum *= request_weights[rank_adapter[rank]];
            }
            t[j * stride + m] = sum;
        }
    };

    float sums[tile_rows][vector] = {};
    bool is_used = false;
    for (int window = 0; window < ranks; window += LORA_WINDOW) {
        int count = list_active<1>(rank_adapter, request_weights, adapters, ranks, window, list, counts);
        is_used |= count > 0;
        for (int begin = 0; begin < count; begin += staged) {
            if (begin > 0) __syncthreads();
            stage_t(window, begin, count);
            __syncthreads();
            if (column >= n) continue;
            int here = min(staged, count - begin);
#pragma unroll(tile_rows == 1 ? 8 : 4)
            for (int j = split; j < here; j += splits) {
                auto bs = *(const Vector<T, vector> *)(b + (int64)(window + list[begin + j]) * n + column);
#pragma unroll
                for (int m = 0; m < tile_rows; m++)
                    for (int c = 0; c < vector; c++) sums[m][c] = fmaf(t[j * stride + m], to_float(bs[c]), sums[m][c]);
            }
        }
    }
    if (!is_used) return;

    if constexpr (splits > 1) {
        for (int c = 0; c < vector; c++) handed[split][threadIdx.x % threads][c] = sums[0][c];
        __syncthreads();
        if (split > 0) return;
        for (int w = 1; w < splits; w++)
            for (int c = 0; c < vector; c++) sums[0][c] += handed[w][threadIdx.x][c];
    }
    if (column >= n) return;
#pragma unroll
    for (int m = 0; m < tile_rows; m++) {
        if (m >= tile.count) break;
        auto *target = (Vector<Y, vector> *)(y + (int64)(tile.first + m) * n + column);
        auto ys = *target;
        for (int c = 0; c < vector; c++) ys[c] = from_float<Y>(to_float(ys[c]) + sums[m][c]);
        *target = ys;
    }
}
