// rope: each pair (p, q) of a head becomes (p cos - q sin, q cos + p sin), sin and cos from the row of the token's position
//
//   NeoX    pair j is columns (j, j + pairs)        GPT-J   pair j is columns (2j, 2j + 1)
//   Columns from 2 * pairs on are copied. Tokens whose position is outside the tables become NaN.
//
// Work split  one block per token; a thread takes `vector` pairs of one head as two accesses of `vector` values (NeoX: one
//             in each half, GPT-J: adjacent), or `vector` copied columns.
// Numerics    fp32, one product rounded and one fused multiply-add, one rounding at the store.
// Limits      none on batch * seq (grid x); y may be x.
// Traffic     tokens * heads * head_dim * 2 * sizeof(T) + 2 * tokens * pairs * sizeof(S) bytes
// Reference   cupyq/ops/rope.py: rope_reference
#include "rope.cuh"

template <typename T, typename S, bool is_neox, int vector>
__global__ void __launch_bounds__(256) rope(
    const T *x,            // [batch, seq, heads, head_dim]
    const S *sin,          // [table_len, pairs]
    const S *cos,          // [table_len, pairs]
    const int *positions,  // [batch, seq] where is_per_token, else [batch]: of each row's first token
    T *y,                  // [batch, seq, heads, head_dim]
    int seq, int heads, int head_dim, int pairs, int table_len, int is_per_token) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int64 position = is_per_token ? positions[blockIdx.x] : (int64)positions[blockIdx.x / seq] + blockIdx.x % seq;
    bool is_inside = position >= 0 && position < table_len;
    const S *sin_row = sin + position * pairs, *cos_row = cos + position * pairs;

    int items = (head_dim - pairs) / vector;  // a head's: pairs to rotate, then columns to copy
    for (int item = threadIdx.x; item < heads * items; item += blockDim.x) {
        int64 head = ((int64)blockIdx.x * heads + item / items) * head_dim;
        int j = item % items * vector;
        if (j < pairs)
            rotate_pairs<T, S, is_neox, vector>(x + head, y + head, sin_row, cos_row, j, pairs, is_inside);
        else if (x != y || !is_inside)
            copy_columns<T, vector>(x + head + pairs + j, y + head + pairs + j, is_inside);
    }
}
