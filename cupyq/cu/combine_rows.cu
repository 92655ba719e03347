// combine_rows: z[r, c] = sum over j of weights[r, j] * y[r * top_k + j, c]; where weights[r, j] is 0, that row of y is not read
//
// Work split  blocks (row, chunk of columns), 256 threads of `vector` values; more columns than 64 chunks are looped over.
// Numerics    fp32 fused multiply-adds from 0, in the order of j.
// Limits      none on rows (grid x), top_k or cols.
// Traffic     rows * cols * (4 + sizeof(Y) * weights that are not 0) bytes
// Reference   cupyq/ops/routing.py: combine_rows_reference
#include "ptx.cuh"

template <typename Y, int vector>
__global__ void __launch_bounds__(256) combine_rows(
    const Y *y,            // [rows * top_k, cols]
    const float *weights,  // [rows, top_k]
    float *z,              // [rows, cols]
    int cols, int top_k) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int64 row = blockIdx.x;
    for (int c = (blockIdx.y * 256 + threadIdx.x) * vector; c < cols; c += gridDim.y * 256 * vector) {
        Vector<float, vector> sum = {};
        for (int j = 0; j < top_k; j++) {
            float weight = weights[row * top_k + j];
            if (weight == 0) continue;
            auto values = *(const Vector<Y, vector> *)(y + (row * top_k + j) * cols + c);
            for (int i = 0; i < vector; i++) sum[i] = fmaf(weight, to_float(values[i]), sum[i]);
        }
        *(Vector<float, vector> *)(z + row * cols + c) = sum;
    }
}
