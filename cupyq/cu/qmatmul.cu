// qmatmul: y[m, n] = sum_j x[m, j] * (code[j, n] - zero[g, n]) * scale[g, n] + bias[n] + residual[m, n]
//          g = group of stored row j; for several matrices side by side, each with columns of y of its own
// gated:   y = activation(gate[m, n]) * up[m, n], the products (with bias) of the first and the second matrix
//
// Work split  a thread block has warps_n x warps_k warps and works through items of up to 8 * m_tiles rows of y (blockIdx.y) x
//             32 * warps_n columns x one slice of K, every gridDim.x-th; a warp takes 32 columns and a contiguous share of each
//             chunk of the slice. Weights are the 16-row operand of mma.m16n8k16: y^T = W^T x^T. Words, scales and zeros are
//             copied `slots` steps of 128 rows ahead into a ring of each warp's own. x, in stored row order
//             (gather_columns.cu), is copied to shared memory, all of it if there is room, else chunk by chunk.
// Numerics    code - zero is exact in T; products and sums over a group within a step are fp32; each such sum is scaled in fp32.
//             Shares of a thread block are added in warp order, slices in slice order by whichever block arrives last: the same
//             bits on every run, and for one cut whatever the other rows are. One rounding at the store.
// Limits      any m, n a multiple of 4, x 16-byte aligned, blocks of mixed width in falling order, K to 2^18.
// Traffic     weight bytes + scales + m * (k + n) * sizeof(T); x is read once per thread block (with one chunk), from L2.
// Reference   cupyq/ops/qmatmul.py: qmatmul_reference, qmatmul_gated_reference
#include "qmatmul.cuh"

template <typename T, bool has_zeros, int widths, int m_tiles, int warps_n, int warps_k, int slots, int gate>
__global__ void __launch_bounds__(32 * warps_n * warps_k, blocks_per_sm(has_zeros, widths, m_tiles, warps_n *warps_k))
    qmatmul(
        const __grid_constant__ Matrices matrices,  // their widths are among `widths`
        const T *x,                                 // [m, 32 * blocks]
        void *y,                                    // [m, y_stride] of T, or float where y_is_float
        const void *residual,                       // as y, or null
        float *partial,                             // [slices, m, 32 * column_tiles], unused with one slice
        uint32 *arrived,                            // [gridDim.y, items / slices]: zero before and after
        int matrix_count, int column_tiles, int blocks, int slices, int slice_steps, int chunk_steps, int m,
        int y_stride, bool y_is_float) {
    struct Rows {
        int first, count;
        __device__ __forceinline__ int of_x(int r) const { return first + r; }
        __device__ __forceinline__ int of_y(int r) const { return first + r; }
    };
    let_next_kernel_start();
    int first = blockIdx.y * 8 * m_tiles, groups_of_tiles = (column_tiles + warps_n - 1) / warps_n;
    Cut cut = {column_tiles, blocks, slices, slice_steps, chunk_steps, m_tiles > 1 ? 8 * m_tiles : min(8, m)};
    Output out = {y, residual, partial, arrived + blockIdx.y * groups_of_tiles, m, y_stride, y_is_float};
    multiply_rows<T, has_zeros, widths, m_tiles, warps_n, warps_k, slots, gate>(
        x, matrices.at, matrix_count, Rows{first, min(8 * m_tiles, m - first)}, blocks * TILE, cut, out, blockIdx.x,
        gridDim.x, [] { wait_for_previous_kernel(); });
}
