// qmatmul: y[m, n] = sum_j x[m, j] * (code[j, n] - zero[g, n]) * scale[g, n] + bias[n]       g = group of stored row j
//
// Work split  a thread block has warps_n x warps_k warps and computes 8 * m_tiles rows of y for 32 * warps_n columns over one
//             K slice (blockIdx.y); a warp takes 32 columns and a contiguous share of the slice's 32-row blocks. Weights are the
//             16-row operand of mma.m16n8k16, straight from registers: y^T = W^T x^T. A lane loads its weight words `stages`
//             blocks ahead. x, already in stored row order (gather_columns.cu), is copied to shared memory chunk by chunk.
// Numerics    code - zero is exact in T; products and sums over a block are fp32; each block's sum is scaled in fp32. K shares
//             of a thread block are added in warp order, slices in slice order by whichever block arrives last: the same bits on
//             every run. One rounding at the store.
// Limits      any m (blockIdx.z), n a multiple of 4, x 16-byte aligned, blocks of mixed width in falling order.
// Traffic     weight bytes + scales + m * (k + n) * sizeof(T); x is read once per column of thread blocks, from L2.
// Reference   cupyq/ops/qmatmul.py: qmatmul_reference
#include "qmatmul.cuh"

template <typename T, bool has_zeros, int widths, int m_tiles, int warps_n, int warps_k>
__global__ void __launch_bounds__(32 * warps_n * warps_k, blocks_per_sm(widths, m_tiles)) qmatmul(
    const T *x,              // [m, 32 * blocks]
    const uint32 *tiles,     // [column tiles, words_per_column_tile]
    const half *scales,      // [groups, padded_n]
    const half *zeros,       // [groups, padded_n], null without has_zeros: the zero is 2^(bits - 1)
    const int *block_group,  // [blocks]
    const float *bias,       // [n] or null
    void *y,                 // [m, n] of T, or float where y_is_float
    float *partial,          // [slices, m, padded_n], unused with one slice
    uint32 *arrived,         // [thread blocks of one slice]: zero before and after
    int m, int n, int padded_n, int words_per_column_tile, int slice_blocks, int chunk_blocks, bool y_is_float,
    int blocks8, int blocks6, int blocks5, int blocks4, int blocks3,
    int blocks2) {  // widths is the set of those not zero
    struct Rows {
        int first, count;
        __device__ __forceinline__ int of_x(int r) const { return first + r; }
        __device__ __forceinline__ int of_y(int r) const { return first + r; }
    };
    int first = blockIdx.z * 8 * m_tiles, blocks = blocks8 + blocks6 + blocks5 + blocks4 + blocks3 + blocks2;
    Matrix matrix = {tiles, scales, zeros, block_group, nullptr, bias, words_per_column_tile,
        {blocks8, blocks6, blocks5, blocks4, blocks3, blocks2}, blocks};
    multiply_rows<T, has_zeros, widths, m_tiles, warps_n, warps_k>(
        x, matrix, y, partial, arrived + blockIdx.z * gridDim.x + blockIdx.x, Rows{first, min(8 * m_tiles, m - first)},
        blocks * TILE, m, n, padded_n, blockIdx.x, slice_blocks, chunk_blocks, y_is_float);
}
