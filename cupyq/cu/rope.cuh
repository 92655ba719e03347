// The rotation of rope.cu and qkv_append.cu, written so that both round alike.
#pragma once
#include "ptx.cuh"

// `vector` pairs of one head, from pair j on, of which pair i is columns (i, i + pairs) for NeoX, (2i, 2i + 1) for GPT-J. Two
// accesses of `vector` values: one in each half, or adjacent. `to` may be `from`. Not is_inside: NaN.
template <typename T, typename S, bool is_neox, int vector>
__device__ __forceinline__ void rotate_pairs(
    const T *from,     // [head_dim]
    T *to,             // [head_dim]
    const S *sin_row,  // [pairs]
    const S *cos_row,  // [pairs]
    int j, int pairs, bool is_inside) {
    int at[2] = {is_neox ? j : 2 * j, is_neox ? j + pairs : 2 * j + vector};
    Vector<T, vector> values[2];
    for (int h = 0; h < 2; h++) values[h] = *(const Vector<T, vector> *)(from + at[h]);
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
        p = from_float<T>(fmaf(-q_float, s, __fmul_rn(p_float, c)));
        q = from_float<T>(fmaf(p_float, s, __fmul_rn(q_float, c)));
    }
    for (int h = 0; h < 2; h++) *(Vector<T, vector> *)(to + at[h]) = values[h];
}

// `vector` columns that do not turn.
template <typename T, int vector>
__device__ __forceinline__ void copy_columns(const T *from, T *to, bool is_inside) {
    auto values = *(const Vector<T, vector> *)from;
    if (!is_inside)
        for (int i = 0; i < vector; i++) values[i] = from_float<T>(nan_float());
    *(Vector<T, vector> *)to = values;
}
