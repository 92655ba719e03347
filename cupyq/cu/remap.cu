// remap_columns: y[r, c] = x[r, index[c]]
// remap_nibbles: nibble c % 8 of y[r, c / 8] = nibble index[c] % 8 of x[r, index[c] / 8]
//
// Work split  one thread per word of y's row; blockIdx.y strides over the rows.
// Numerics    integers; an index outside the row gives 0 and reads nothing.
// Limits      remap_nibbles: cols a multiple of 8; any rows, any address; y must not overlap x.
// Traffic     rows * words * 8 bytes, where the gathered sectors stay in L1.
// Reference   cupyq/ops/remap.py: remap_columns_reference, cupyq/ops/remap.py: remap_nibbles_reference
#include "types.cuh"

__global__ void __launch_bounds__(128) remap_columns(
    const uint32 *x,   // [rows, cols]
    const int *index,  // [cols]
    uint32 *y,         // [rows, cols]
    int rows, int cols) {
    int c = blockIdx.x * 128 + threadIdx.x;
    if (c >= cols) return;
    uint32 from = index[c];
    bool is_inside = from < (uint32)cols;
    for (int r = blockIdx.y; r < rows; r += gridDim.y)
        y[(int64)r * cols + c] = is_inside ? x[(int64)r * cols + from] : 0u;
}

__global__ void __launch_bounds__(128) remap_nibbles(
    const uint32 *x,   // [rows, words]
    const int *index,  // [8 * words]
    uint32 *y,         // [rows, words]
    int rows, int words) {
    int c = blockIdx.x * 128 + threadIdx.x;
    if (c >= words) return;
    uint32 from[8];
    for (int i = 0; i < 8; i++) from[i] = index[(int64)8 * c + i];
    for (int r = blockIdx.y; r < rows; r += gridDim.y) {
        const uint32 *row = x + (int64)r * words;
        uint32 word = 0;
        for (int i = 0; i < 8; i++)
            if (from[i] / 8 < (uint32)words) word |= (row[from[i] / 8] >> 4 * (from[i] % 8) & 15u) << 4 * i;
        y[(int64)r * words + c] = word;
    }
}
