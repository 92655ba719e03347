// qmatmul_grouped: y[p, n] = sum_j x[row of p, j] * (code[j, n] - zero[g, n]) * scale[g, n] + bias[n] for every pair p of a row
// and an expert, with the codes, zeros, scales and bias of that expert
//
// Work split  as qmatmul.cu, one row tile of group_rows.cu (pairs of one expert) to a thread block: blockIdx.x counts the column
//             blocks of the first row tile, then those of the next. Unused entries of the table return at once.
// Numerics    as qmatmul.cu: the bits of a pair depend on its row of x, its expert and the cut alone, not on other pairs.
// Limits      any number of pairs and of matrices; n a multiple of 4, x 16-byte aligned; widths may differ by expert.
// Traffic     weight bytes + scales of every row tile (those of one expert after the first from L2, where they fit) +
//             pairs * (k + n) * sizeof(T)
// Reference   cupyq/ops/qmatmul_grouped.py: qmatmul_grouped_reference
#include "qmatmul.cuh"

template <typename T, bool has_zeros, int widths, int m_tiles, int warps_n, int warps_k>
__global__ void __launch_bounds__(32 * warps_n * warps_k, blocks_per_sm(widths, m_tiles)) qmatmul_grouped(
    const T *x,              // [pairs / pairs_per_row, x_stride]
    const Matrix *matrices,  // [experts]; widths is the set of all theirs
    const RowTile *tiles,    // [row tiles], of at most 8 * m_tiles rows
    const int *order,        // [pairs]: those of one expert after those of the one before
    void *y,                 // [pairs, n] of T, or float where y_is_float
    float *partial,          // [slices, pairs, padded_n], unused with one slice
    uint32 *arrived,         // [thread blocks of one slice]: zero before and after
    int pairs, int pairs_per_row, int n, int padded_n, int x_stride, int column_blocks, int slice_blocks,
    int chunk_blocks, bool y_is_float) {
    struct Rows {
        const int *pair;
        int count, pairs_per_row;
        __device__ __forceinline__ int of_x(int r) const { return pair[r] / pairs_per_row; }
        __device__ __forceinline__ int of_y(int r) const { return pair[r]; }
    };
    RowTile tile = tiles[blockIdx.x / column_blocks];
    if (tile.rows == 0) return;
    Rows rows = {order + tile.first, tile.rows, pairs_per_row};
    multiply_rows<T, has_zeros, widths, m_tiles, warps_n, warps_k>(
        x, matrices[tile.expert], y, partial, arrived + blockIdx.x, rows, x_stride, pairs, n, padded_n,
        blockIdx.x % column_blocks, slice_blocks, chunk_blocks, y_is_float);
}
