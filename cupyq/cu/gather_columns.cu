// gather_columns: y[r, j] = x[r, column[j]], zero where column[j] is -1: activations in the stored row order of a QMatrix
//
// Work split  one thread per pair of columns; blockIdx.y strides over the rows.
// Numerics    copies.
// Limits      count a multiple of 32; any rows, any address of x.
// Traffic     rows * count * (sizeof(T) + one 32-byte sector) bytes, from L2.
// Reference   cupyq/ops/qmatmul.py: qmatmul_reference, which takes x as it is
#include "types.cuh"

template <typename T>
__global__ void __launch_bounds__(128) gather_columns(
    const T *x,         // [rows, k]
    const int *column,  // [count] or null
    T *y,               // [rows, count]
    int rows, int k, int count) {
    int j = 2 * (blockIdx.x * 128 + threadIdx.x);
    if (j >= count) return;
    int first = column ? column[j] : j, second = column ? column[j + 1] : j + 1;  // count is a multiple of 32
    for (int r = blockIdx.y; r < rows; r += gridDim.y) {
        const T *row = x + (int64)r * k;
        Vector<T, 2> pair = {first < 0 ? T{0} : row[first], second < 0 ? T{0} : row[second]};
        *(Vector<T, 2> *)(y + (int64)r * count + j) = pair;
    }
}
