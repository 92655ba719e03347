// embedding: y[r, c] = scale * table[ids[r], c]; rows whose id is outside the table become NaN
//
// Work split  blocks (row, chunk of columns), 256 threads of `vector` values; more columns than 64 chunks are looped over.
// Numerics    one fp32 product, one rounding at the store (none where scale is 1 and the dtypes agree).
// Limits      none on rows (grid x); ids are never trusted: no access leaves the table.
// Traffic     rows * dim * (sizeof(T) + sizeof(Y)) bytes
// Reference   cupyq/ops/embedding.py: embedding_reference
#include "ptx.cuh"

template <typename Id, typename T, typename Y, int vector>
__global__ void __launch_bounds__(256) embedding(
    const Id *ids,   // [rows]
    const T *table,  // [vocab, dim]
    Y *y,            // [rows, dim]
    int vocab, int dim, float scale) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int64 id = ids[blockIdx.x];
    bool is_known = id >= 0 && id < vocab;
    for (int c = (blockIdx.y * 256 + threadIdx.x) * vector; c < dim; c += gridDim.y * 256 * vector) {
        Vector<T, vector> values;
        if (is_known) values = *(const Vector<T, vector> *)(table + id * dim + c);
        Vector<Y, vector> ys;
        for (int i = 0; i < vector; i++) ys[i] = from_float<Y>(is_known ? scale * to_float(values[i]) : nan_float());
        *(Vector<Y, vector> *)(y + (int64)blockIdx.x * dim + c) = ys;
    }
}
