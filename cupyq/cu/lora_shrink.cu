// lora_shrink: partial[s, r, j] = sum over i in K slice s of x[r, i] * a[i, j]       lora_shrink_mma: the same on tensor cores
//
// Work split  a thread block takes `tile_rows` rows of one request (blockIdx.x), one K slice (blockIdx.y), and every gridDim.z-th
//             group of rank columns among those whose adapter the request uses; the others are neither read nor written.
//             lora_shrink, for few rows: 16 columns at a time, `vector` per thread, the threads of a column group spread over K.
//             lora_shrink_mma, for many: 64 rows x 64 columns, K in steps of 64 through two shared buffers; a warp has 16 rows.
// Numerics    fp32 products and sums. lora_shrink adds the lanes of a warp as a tree, then the warps in order. The slices are added,
//             in order, by lora_expand.cu, which also multiplies by the weights.
// Limits      any rows, k and ranks; vector divides ranks, x_vector k, and a_vector ranks; slice_k a multiple of 64.
// Traffic     rows * k * sizeof(T) + k * (ranks in use) * sizeof(T) + 4 * slices * rows * (ranks in use) bytes; few rows read a
//             once per request, from L2.
// Reference   cupyq/ops/lora.py: lora_reference
#include "lora.cuh"
#include "ptx.cuh"

template <typename T, int vector, int tile_rows>
__global__ void __launch_bounds__(LORA_THREADS, tile_rows == 1 ? 6 : 3) lora_shrink(
    const T *x,               // [rows, k]
    const T *a,               // [k, ranks]
    const int *rank_adapter,  // [ranks]
    const float *weights,     // [rows / seq, adapters]
    float *partial,           // [slices, rows, ranks]
    int rows, int seq, int k, int ranks, int adapters, int slice_k) {
    constexpr int columns = 16, vectors = columns / vector, warps = LORA_THREADS / 32;
    __shared__ int list[LORA_WINDOW / vector], counts[32];
    __shared__ float handed[warps][tile_rows][columns];

    LoraRows tile = lora_rows<tile_rows>(blockIdx.x, seq);
    int begin = blockIdx.y * slice_k, end = min(begin + slice_k, k);
    int v = threadIdx.x % vectors, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const T *tile_x = x + (int64)tile.first * k;
    float *tile_partial = partial + ((int64)blockIdx.y * rows + tile.first) * ranks;

    for (int window = 0; window < ranks; window += LORA_WINDOW) {
        const float *request_weights = weights + (int64)tile.request * adapters;
        int count = list_active<vector>(rank_adapter, request_weights, adapters, ranks, window, list, counts);
        for (int group = blockIdx.z * vectors; group < count; group += gridDim.z * vectors) {
            float sums[tile_rows][vector] = {};
            if (group + v < count) {
                const T *column = a + window + list[group + v] * vector;
#pragma unroll(tile_rows == 1 ? 8 : 2)
                for (int i = begin + threadIdx.x / vectors; i < end; i += LORA_THREADS / vectors) {
                    auto as = *(const Vector<T, vector> *)(column + (int64)i * ranks);
#pragma unroll
                    for (int m = 0; m < tile_rows; m++) {
                        float xs = to_float(tile_x[(int64)min(m, tile.count - 1) * k + i]);
                        for (int c = 0; c < vector; c++) sums[m][c] = fmaf(xs, to_float(as[c]), sums[m][c]);
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < tile_rows; m++)
                for (int c = 0; c < vector; c++) {
                    for (int step = vectors; step < 32; step *= 2)
                        sums[m][c] += __shfl_xor_sync(0xffffffffu, sums[m][c], step);
                    if (lane < vectors) handed[warp][m][lane * vector + c] = sums[m][c];
                }
            __syncthreads();
            for (int i = threadIdx.x; i < tile.count * columns; i += LORA_THREADS) {
                int m = i / columns, c = i % columns;
                if (group + c / vector >= count) continue;
                float sum = 0;
                for (int w = 0; w < warps; w++) sum += handed[w][m][c];
                tile_partial[(int64)m * ranks + window + list[group + c / vector] * vector + c % vector] = sum;
            }
            __syncthreads();
        }
    }
}

template <typename T, int x_vector, int a_vector>
__global__ void __launch_bounds__(LORA_THREADS, 3) lora_shrink_mma(
    const T *x,               // [rows, k]
    const T *a,               // [k, ranks]
    const int *rank_adapter,  // [ranks]
    const float *weights,     // [rows / seq, adapters]
    float *partial,           // [slices, rows, ranks]
    int rows, int seq, int k, int ranks, int adapters, int slice_k) {
    // Shared rows are 144 bytes apart: the 8 rows an ldmatrix reads lie in different banks.
    constexpr int tile_rows = 64, k_step = 64, groups = 8, width = 8, stride = 72;
    static_assert(sizeof(T) == 2 && stride >= k_step && stride >= groups * width, "16-bit tiles of 64 x 64");
    __shared__ alignas(16) T sX[2][tile_rows * stride], sA[2][k_step * stride];
    __shared__ int list[LORA_WINDOW / width], counts[32];

    LoraRows tile = lora_rows<tile_rows>(blockIdx.x, seq);
    int begin = blockIdx.y * slice_k, end = min(begin + slice_k, k);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const T *tile_x = x + (int64)tile.first * k;
    float *tile_partial = partial + ((int64)blockIdx.y * rows + tile.first) * ranks;

    // 64 rows of x and 64 rows of a, from row or column `first_k` of K on; zeros beyond the edges.
    auto stage = [&](int buffer, int first_k, int window, int group, int count) {
        for (int i = threadIdx.x; i < tile_rows * k_step / x_vector; i += LORA_THREADS) {
            int r = i / (k_step / x_vector), c = i % (k_step / x_vector) * x_vector;
            bool is_valid = r < tile.count && first_k + c < end;
            const T *source = is_valid ? tile_x + (int64)r * k + first_k + c : x;
            T *target = &sX[buffer][r * stride + c];
            if constexpr (x_vector == 8)
                copy_async_16(target, source, is_valid);
            else
                *target = is_valid ? *source : T{};
        }
        for (int i = threadIdx.x; i < k_step * groups * width / a_vector; i += LORA_THREADS) {
            int r = i / (groups * width / a_vector), c = i % (groups * width / a_vector) * a_vector,
                g = group + c / width;
            int column = g < count ? window + list[g] * width + c % width : ranks;
            bool is_valid = column < ranks && first_k + r < end;
            const T *source = is_valid ? a + (int64)(first_k + r) * ranks + column : a;
            T *target = &sA[buffer][r * stride + c];
            if constexpr (a_vector == 8)
                copy_async_16(target, source, is_valid);
            else
                *target = is_valid ? *source : T{};
        }
    };

    for (int window = 0; window < ranks; window += LORA_WINDOW) {
        const float *request_weights = weights + (int64)tile.request * adapters;
        int count = list_active<width>(rank_adapter, request_weights, adapters, ranks, window, list, counts);
        for (int group = blockIdx.z * groups; group < count; group += gridDim.z * groups) {
            float sums[groups][4] = {};
            int buffer = 0;
            stage(buffer, begin, window, group, count);
            copy_async_commit();
            for (int first_k = begin; first_k < end; first_k += k_step, buffer ^= 1) {
                if (first_k + k_step < end) stage(buffer ^ 1, first_k + k_step, window, group, count);
                copy_async_commit();
                copy_async_wait<1>();
                __syncthreads();
#pragma unroll
                for (int step = 0; step < k_step; step += 16) {
                    uint32 xs[4], as[4];
                    ldmatrix_x4(xs, &sX[buffer][(16 * warp + lane % 16) * stride + step + lane / 16 * 8]);
#pragma unroll
                    for (int g = 0; g < groups; g += 2) {
                        if (group + g >= count) break;
                        ldmatrix_x4<true>(as, &sA[buffer][(step + lane % 16) * stride + (g + lane / 16) * width]);
                        mma_16x8x16<T>(sums[g], xs, {as[0], as[1]});
                        mma_16x8x16<T>(sums[g + 1], xs, {as[2], as[3]});
                    }
                }
                __syncthreads();
            }
#pragma unroll
            for (int g = 0; g < groups; g++) {
                if (group + g >= count) break;
                int column = window + list[group + g] * width + lane % 4 * 2;
                for (int e = 0; e < 4; e++) {
                    int r = 16 * warp + lane / 4 + e / 2 * 8;
                    if (r < tile.count && column + e % 2 < ranks)
                        tile_partial[(int64)r * ranks + column + e % 2] = sums[g][e];
                }
            }
        }
    }
}
