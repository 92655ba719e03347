// qmatmul_grouped: y[p, n] = sum_j x[row of p, j] * (code[j, n] - zero[g, n]) * scale[g, n] + bias[n] for every pair p of a row
// and an expert, with the codes, zeros, scales and bias of that expert
//
// Work split  as qmatmul.cu, one item to a thread block, for one row tile of group_rows.cu (pairs of one expert; blockIdx.y).
//             Unused entries of the table return at once.
// Numerics    as qmatmul.cu: the bits of a pair depend on its row of x, its expert and the cut alone, not on other pairs.
// Limits      any number of pairs and of matrices; n a multiple of 4, x 16-byte aligned; widths may differ by expert.
// Traffic     weight bytes + scales of every row tile (those of one expert after the first from L2, where they fit) +
//             pairs * (k + n) * sizeof(T)
// Reference   cupyq/ops/qmatmul_grouped.py: qmatmul_grouped_reference
#include "qmatmul.cuh"

template <typename T, bool has_zeros, int widths, int m_tiles, int warps_n, int warps_k, int slots>
__global__ void __launch_bounds__(32 * warps_n * warps_k, blocks_per_sm(has_zeros, widths, m_tiles, warps_n *warps_k))
    qmatmul_grouped(
        const Matrix *matrices,  // [experts]; widths is the set of all theirs
        const T *x,              // [pairs / pairs_per_row, x_stride]
        const RowTile *tiles,    // [gridDim.y], of at most 8 * m_tiles rows
        const int *order,        // [pairs]: those of one expert after those of the one before
        void *y,                 // [pairs, n] of T, or float where y_is_float
        float *partial,          // [slices, pairs, 32 * column_tiles], unused with one slice
        uint32 *arrived,         // [gridDim.y, items / slices]: zero before and after
        int pairs, int pairs_per_row, int column_tiles, int x_stride, int staged_rows, int slices, int slice_steps,
        int chunk_steps, bool y_is_float) {
    struct Rows {
        const int *pair;
        int count, pairs_per_row;
        __device__ __forceinline__ int of_x(int r) const { return pair[r] / pairs_per_row; }
        __device__ __forceinline__ int of_y(int r) const { return pair[r]; }
    };
    let_next_kernel_start();
    wait_for_previous_kernel();
    RowTile tile = tiles[blockIdx.y];
    if (tile.rows == 0) return;
    const Matrix matrix = matrices[tile.expert];
    Rows rows = {order + tile.first, tile.rows, pairs_per_row};
    int groups_of_tiles = (column_tiles + warps_n - 1) / warps_n;
    Cut cut = {column_tiles, matrix.blocks, slices, slice_steps, chunk_steps, staged_rows};
    Output out = {y, nullptr, partial, arrived + blockIdx.y * groups_of_tiles, pairs, matrix.n, y_is_float};
    multiply_rows<T, has_zeros, widths, m_tiles, warps_n, warps_k, slots, PLAIN>(
        x, &matrix, 1, rows, x_stride, cut, out, blockIdx.x, gridDim.x, [] {});
}
