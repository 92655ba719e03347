// gather_columns: y[r, j] = x[r, column[j]], zero where column[j] is -1: activations in the stored row order of a QMatrix
// gather_columns_grouped: the same for every pair of a row and an expert, in the stored row order of that expert's matrix
//
// Work split  one thread per pair of columns; blockIdx.y strides over the rows, or over the row tiles of group_rows.cu.
// Numerics    copies.
// Limits      count a multiple of 32; any rows, any address of x.
// Traffic     rows * count * (sizeof(T) + one 32-byte sector) bytes, from L2.
// Reference   cupyq/ops/qmatmul.py: qmatmul_reference, which takes x as it is
#include "matrix.cuh"
#include "ptx.cuh"

// The two values of a row that belong at stored columns j and j + 1.
template <typename T> __device__ __forceinline__ Vector<T, 2> gathered_pair(const T *row, int first, int second) {
    return {first < 0 ? T{0} : row[first], second < 0 ? T{0} : row[second]};
}

template <typename T>
__global__ void __launch_bounds__(128) gather_columns(
    const T *x,         // [rows, k]
    const int *column,  // [count] or null
    T *y,               // [rows, count]
    int rows, int k, int count) {
    int j = 2 * (blockIdx.x * 128 + threadIdx.x);
    int first = j, second = j + 1;                                       // count is a multiple of 32
    if (column && j < count) first = column[j], second = column[j + 1];  // of a QMatrix: no kernel writes it
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (j >= count) return;
    for (int r = blockIdx.y; r < rows; r += gridDim.y)
        *(Vector<T, 2> *)(y + (int64)r * count + j) = gathered_pair(x + (int64)r * k, first, second);
}

template <typename T>
__global__ void __launch_bounds__(128) gather_columns_grouped(
    const T *x,              // [pairs / pairs_per_row, k]
    const Matrix *matrices,  // [experts]
    const RowTile *tiles,    // [tile_count]
    const int *order,        // [pairs]
    T *y,                    // [pairs, count]; of a row, the first 32 * blocks of its matrix are written
    int tile_count, int pairs_per_row, int k, int count) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int j = 2 * (blockIdx.x * 128 + threadIdx.x);
    for (int t = blockIdx.y; t < tile_count; t += gridDim.y) {
        RowTile tile = tiles[t];
        if (tile.rows == 0) return;  // unused entries come last
        const int *column = matrices[tile.expert].rows;
        if (j >= 32 * matrices[tile.expert].blocks) continue;
        int first = column ? column[j] : j, second = column ? column[j + 1] : j + 1;
        for (int r = 0; r < tile.rows; r++) {
            int pair = order[tile.first + r];
            *(Vector<T, 2> *)(y + (int64)pair * count + j) =
                gathered_pair(x + (int64)(pair / pairs_per_row) * k, first, second);
        }
    }
}
