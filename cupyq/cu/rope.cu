// rope: each pair (p, q) of a head becomes (p cos - q sin, q cos + p sin), sin and cos from the row of the token's position
//
//   NeoX    pair j is columns (j, j + pairs)        GPT-J   pair j is columns (2j, 2j + 1)
//   Columns from 2 * pairs on are copied. Tokens whose position is outside the tables become NaN.
//
// Work split  one block per token; a thread takes `vector` pairs of one head as two accesses of `vector` values (NeoX: one
//             in each half, GPT-J: adjacent), or `vector` copied columns.
// Numerics    fp32, one rounding at the store.
// Limits      none on batch * seq (grid x); y may be x.
// Traffic     tokens * heads * head_dim * 2 * sizeof(T) + 2 * tokens * pairs * sizeof(S) bytes
// Reference   cupyq/ops/rope.py: rope_reference
#include "types.cuh"

template <typename T, typename S, bool is_neox, int vector>
__global__ void __launch_bounds__(256) rope(
    const T *x,            // [batch, seq, heads, head_dim]
    const S *sin,          // [table_len, pairs]
    const S *cos,          // [table_len, pairs]
    const int *positions,  // [batch, seq] where is_per_token, else [batch]: of each row's first token
    T *y,                  // [batch, seq, heads, head_dim]
    int seq, int heads, int head_dim, int pairs, int table_len, int is_per_token) {
    int64 position = is_per_token ? positions[blockIdx.x] : (int64)positions[blockIdx.x / seq] + blockIdx.x % seq;
    bool is_inside = position >= 0 && position < table_len;
    const S *sin_row = sin + position * pairs, *cos_row = cos + position * pairs;

    int items = (head_dim - pairs) / vector;  // a head's: pairs to rotate, then columns to copy
    for (int item = threadIdx.x; item < heads * items; item += blockDim.x) {
        int64 head = ((int64)blockIdx.x * heads + item / items) * head_dim;
        int j = item % items * vector;
        if (j < pairs) {
            int at[2] = {is_neox ? j : 2 * j, is_neox ? j + pairs : 2 * j + vector};
            Vector<T, vector> values[2];
            for (int h = 0; h < 2; h++) values[h] = *(const Vector<T, vector> *)(x + head + at[h]);
            Vector<S, vector> sines, cosines;
            if (is_inside) {
                sines = *(const Vector<S, vector> *)(sin_row + j);
                cosines = *(const Vector<S, vector> *)(cos_row + j);
            }
            for (int i = 0; i < vector; i++) {
                T &p = is_neox ? values[0][i] : values[2 * i / vector][2 * i % vector];
                T &q = is_neox ? values[1][i] : values[(2 * i + 1) / vector][(2 * i + 1) % vector];
                float s = is_inside ? to_float(sines[i]) : nan_float();
                float c = is_inside ? to_float(cosines[i]) : nan_float();
                float p_float = to_float(p), q_float = to_float(q);
                p = from_float<T>(p_float * c - q_float * s);
                q = from_float<T>(q_float * c + p_float * s);
            }
            for (int h = 0; h < 2; h++) *(Vector<T, vector> *)(y + head + at[h]) = values[h];
        } else if (x != y || !is_inside) {
            auto values = *(const Vector<T, vector> *)(x + head + pairs + j);
            if (!is_inside)
                for (int i = 0; i < vector; i++) values[i] = from_float<T>(nan_float());
            *(Vector<T, vector> *)(y + head + pairs + j) = values;
        }
    }
}
