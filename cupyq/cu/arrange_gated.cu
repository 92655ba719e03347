// arrange_gated: images[b][s][r][j] = h[rows * b + r, order[64 s + j]], 0 where that is -1 and beyond the end, of
//                h = f(gate) * up for the functions f of activation.cuh: activate.cu, then arrange_rows.cu
//
// Work split  as many thread blocks as fit the GPU take every gridDim.x-th row each, and of it the blockIdx.y-th part: a row of h
//             to shared memory, and from there in order, a chunk of 8 columns a thread at a time.
// Numerics    those of activate.cu, bit by bit: fp32, one rounding.
// Limits      count a multiple of 32; rows one of 8; k a multiple of 8 below 2^16; 16 * (chunks of a part + k / 8 + 1) bytes of
//             shared memory. order null: identity, k = count. vector is 8, or 1 for any address.
// Traffic     m * (2 k + count) * sizeof(T) bytes; count * 4 bytes per thread block, from L2.
// Reference   cupyq/ops/arrange.py: arrange_gated_reference
#include "activation.cuh"
#include "arrange.cuh"

template <typename T, int function, int vector>
__global__ void __launch_bounds__(512, function == GELU ? 1 : 2) arrange_gated(
    const T *gate,     // [m, k], rows `stride` values apart
    const T *up,       // as gate
    const int *order,  // [count], or null
    uint4 *images,     // [ceil(m / rows), ceil(count / 64), rows, 8 chunks]
    int m, int k, int stride, int count, int rows) {
    extern __shared__ uint4 shared[];
    int stages = (count + 63) / 64, all_rows = (m + rows - 1) / rows * rows, row_chunks = k / 8;
    Part part(stages);
    uint4 *columns = shared, *held = columns + (order ? part.end - part.begin : 0);
    let_next_kernel_start();
    if (order) load_columns(columns, order, part, count, k);
    if (threadIdx.x == 0) held[row_chunks] = make_uint4(0, 0, 0, 0);
    wait_for_previous_kernel();

    Vector<T, vector> gates[8 / vector], ups[8 / vector];  // of a thread's next chunk
    auto load = [&](int row, int i) {
        if (row >= m || i >= row_chunks) return;
        int64 at = (int64)row * stride + 8 * i;
        for (int v = 0; v < 8 / vector; v++) gates[v] = *(const Vector<T, vector> *)(gate + at + v * vector);
        for (int v = 0; v < 8 / vector; v++) ups[v] = *(const Vector<T, vector> *)(up + at + v * vector);
    };
    load(blockIdx.x, threadIdx.x);
    for (int row = blockIdx.x; row < all_rows; row += gridDim.x) {
        ImageRow to(images, row, rows, stages);
        if (row >= m) {
            clear_row(to, part);
            continue;
        }
        for (int i = threadIdx.x; i < row_chunks; i += blockDim.x) {
            float f[8], u[8];
            for (int c = 0; c < 8; c++)
                f[c] = to_float(gates[c / vector][c % vector]), u[c] = to_float(ups[c / vector][c % vector]);
            load(row, i + blockDim.x);
            Vector<T, 8> h;
            for (int c = 0; c < 8; c++) h[c] = from_float<T>(activation<function>(f[c]) * u[c]);
            *(Vector<T, 8> *)(held + i) = h;
        }
        load(row + gridDim.x, threadIdx.x);
        __syncthreads();
        if (order)
            gather_row(to, held, columns, part);
        else
            copy_row(to, held, row_chunks, part);
        __syncthreads();
    }
}
