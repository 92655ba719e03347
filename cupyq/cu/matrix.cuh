// One quantized matrix on the device, and the rows of a product that belong to it: what kernels over several matrices read
// from tables.
#pragma once
#include "types.cuh"

// A row of the tables that ops/matrix_table.py makes. `width_blocks` counts the blocks of width 8, 6, 5, 4, 3 and 2.
struct alignas(16) Matrix {
    const uint32 *tiles;     // [column tiles, words_per_column_tile]
    const half *scales;      // [column tiles, groups, 32]
    const half *zeros;       // [column tiles, groups, 32], null: the zero is 2^(bits - 1)
    const int *block_group;  // [blocks]
    const int *rows;         // [32 * blocks]: stored row -> column of x, -1 for padding; null: identity
    const float *bias;       // [n] or null
    int words_per_column_tile;
    int width_blocks[6];
    int blocks, groups, n;
    int first_tile, first_column;  // column tiles and columns of the matrices before it, where several are joined
};
static_assert(sizeof(Matrix) == 96, "TABLE_ROW in ops/matrix_table.py");

// Matrices side by side in one product, passed by value.
constexpr int MAX_JOINED = 4;
struct alignas(16) Matrices {
    Matrix at[MAX_JOINED];
};

// A row of the table of group_rows.cu: up to tile_rows pairs of one expert, order[first .. first + rows). An unused entry has
// rows = 0 and expert = -1.
struct RowTile {
    int expert, first, rows;
};
