// arrange_normed: images[b][s][r][j] = y[rows * b + r, order[64 s + j]], 0 where that is -1 and beyond the end, of
//                 y[r, c] = x[r, c] * w[c] / sqrt(mean_c(x[r, c]^2) + eps): rms_norm.cu, then arrange_rows.cu
//
// Work split  as many thread blocks of 32 * warps threads as fit the GPU take every gridDim.x-th row each, and of it the
//             blockIdx.y-th part: y to shared memory, and from there in order while the next row is on its way.
// Numerics    those of rms_norm.cu, bit by bit: warps and vector, which decide about the order of sums, must be the same.
// Limits      count a multiple of 32; rows one of 8; k a multiple of 8 below 2^16; 16 * (chunks of a part + k / 8 + 1) bytes of
//             shared memory. order null: identity, k = count.
// Traffic     m * (k * sizeof(X) + count * sizeof(T)) bytes; k * sizeof(W) + count * 4 bytes per thread block, from L2; what a row
//             has beyond `held` vectors a thread is read twice, from L1 or L2.
// Reference   cupyq/ops/arrange.py: arrange_normed_reference
#include "arrange.cuh"
#include "norm.cuh"

template <typename X, typename W, typename T, int vector, int warps>
__global__ void __launch_bounds__(32 * warps, warps == 16 ? 2 : 1) arrange_normed(
    const X *x,        // [m, k]
    const W *w,        // [k]
    const int *order,  // [count], or null
    uint4 *images,     // [ceil(m / rows), ceil(count / 64), rows, 8 chunks]
    int m, int k, int count, int rows, float eps) {
    constexpr int step = 32 * warps * vector, held = vector == 8 ? 2 : 4;
    __shared__ float partial[warps];
    extern __shared__ uint4 shared[];
    int stages = (count + 63) / 64, all_rows = (m + rows - 1) / rows * rows, first = threadIdx.x * vector;
    Part part(stages);
    uint4 *columns = shared, *normed = columns + (order ? part.end - part.begin : 0);
    let_next_kernel_start();
    prefetch_row<step>(w, first, k);
    if (order) load_columns(columns, order, part, count, k);
    if (threadIdx.x == 0) normed[k / 8] = make_uint4(0, 0, 0, 0);
    wait_for_previous_kernel();

    RowValues<X, vector, step, held> xs;
    auto load = [&](int row) {
        if (row < m) xs.load(x + (int64)row * k, first, k);
    };
    load(blockIdx.x);
    for (int row = blockIdx.x; row < all_rows; row += gridDim.x) {
        ImageRow to(images, row, rows, stages);
        if (row >= m) {
            clear_row(to, part);
            continue;
        }
        float sum = 0;
        each_column<step, held>(first, k, [&](int c, int h) {
            auto values = xs.at(c, h);
            for (int i = 0; i < vector; i++) sum += to_float(values[i]) * to_float(values[i]);
        });
        float scale = 1.0f / sqrtf(block_sum<warps>(sum, partial) / k + eps);
        each_column<step, held>(first, k, [&](int c, int h) {
            auto x_here = xs.at(c, h);
            auto w_here = *(const Vector<W, vector> *)(w + c);
            Vector<T, vector> ys;
            for (int i = 0; i < vector; i++) ys[i] = from_float<T>(to_float(x_here[i]) * to_float(w_here[i]) * scale);
            *(Vector<T, vector> *)((T *)normed + c) = ys;
        });
        load(row + gridDim.x);
        __syncthreads();
        if (order)
            gather_row(to, normed, columns, part);
        else
            copy_row(to, normed, k / 8, part);
        if (warps == 1) __syncthreads();  // else those of the next row's sum come before its y
    }
}
