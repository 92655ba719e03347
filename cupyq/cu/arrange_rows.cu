// arrange_rows: images[b][s][r][j] = x[rows * b + r, column[64 s + j]], 0 where that is -1 and beyond the end: activations in the
//               stored row order of a QMatrix, as the images that qmatmul_wgmma.cu wants in shared memory
//
// Within an image, 16-byte chunk c of row r lies at byte 128 r + 16 (c ^ (r % 8)): the 128-byte swizzle of wgmma.
// Work split  a thread block takes `together` rows and, of their chunks of 8 values, every gridDim.y-th run of 256. It copies the
//             rows to shared memory first, the values of a column side by side: one read there gathers from all of the rows.
//             A thread then gathers 8 columns, and turns them into one chunk of each row.
// Numerics    copies.
// Limits      count a multiple of 32; rows one of 8; any address of x; k even and (k + 1) * together * 2 bytes of shared memory, or
//             together = 0: values are read from global memory, by chunk and row.
// Traffic     m * (k + count) * 2 bytes; count * 4 bytes per thread block, from L2.
// Reference   cupyq/ops/qmatmul_wgmma.py: arrange_rows_reference
#include "ptx.cuh"

// Both low halves, or both high halves, of two words.
__device__ __forceinline__ uint32 side_by_side(uint32 first, uint32 second, int is_high) {
    uint32 y;
    if (is_high)
        asm("prmt.b32 %0, %1, %2, 0x7632;" : "=r"(y) : "r"(first), "r"(second));
    else
        asm("prmt.b32 %0, %1, %2, 0x5410;" : "=r"(y) : "r"(first), "r"(second));
    return y;
}

template <int words> struct alignas(4 * words) Words {
    uint32 word[words];
};

template <int together>
__global__ void __launch_bounds__(256) arrange_rows(
    const uint16 *x,    // [m, k]
    const int *column,  // [count], or null: identity, where together = 0 and k = count
    uint4 *images,      // [ceil(m / rows), ceil(count / 64), rows, 8 chunks]
    int m, int k, int count, int rows, bool is_aligned) {  // x: to 16 bytes where together = 0, else to 4
    extern __shared__ uint4 shared[];
    constexpr int threads = 256, here = together > 0 ? together : 1;
    int stages = (count + 63) / 64, chunks = stages * 8;
    int first_row = blockIdx.x * here;
    auto store = [&](int row, int i, uint4 v) {
        int r = row % rows;
        images[(((int64)(row / rows) * stages + i / 8) * rows + r) * 8 + (i % 8 ^ r % 8)] = v;
    };
    let_next_kernel_start();
    wait_for_previous_kernel();
    int begin = blockIdx.y * threads + threadIdx.x, step = gridDim.y * threads;
    if constexpr (together == 0) {
        const uint16 *row = x + (int64)first_row * k;
        for (int i = begin; i < chunks; i += step) {
            uint4 chunk = make_uint4(0, 0, 0, 0);
            if (first_row < m && 8 * i < count) {
                if (!column && is_aligned) {
                    chunk = ((const uint4 *)row)[i];
                } else {
                    auto value = [&](int at) {
                        int from = column ? column[at] : at;
                        return from < 0 ? 0u : (uint32)row[from];
                    };
                    auto pair = [&](int at) { return value(at) | value(at + 1) << 16; };
                    chunk = make_uint4(pair(8 * i), pair(8 * i + 2), pair(8 * i + 4), pair(8 * i + 6));
                }
            }
            store(first_row, i, chunk);
        }
    } else {
        constexpr int words = together / 2;  // of a column
        using Column = Words<words>;
        Column *columns = (Column *)shared;
#pragma unroll(16 / together)
        for (int j = 2 * threadIdx.x; j < k; j += 2 * threads) {  // two columns at a time
            uint32 v[together];
#pragma unroll
            for (int r = 0; r < together; r++) {
                int64 at = (int64)min(first_row + r, m - 1) * k + j;
                v[r] = is_aligned ? *(const uint32 *)(x + at) : x[at] | (uint32)x[at + 1] << 16;
            }
            Words<2 * words> both;
#pragma unroll
            for (int w = 0; w < words; w++) {
                both.word[w] = side_by_side(v[2 * w], v[2 * w + 1], 0);
                both.word[words + w] = side_by_side(v[2 * w], v[2 * w + 1], 1);
            }
            *(Words<2 * words> *)(columns + j) = both;
        }
        if (threadIdx.x == 0) columns[k] = Column{};  // what -1 reads
        __syncthreads();
        for (int i = begin; i < chunks; i += step) {
            int4 low = make_int4(-1, -1, -1, -1), high = low;
            if (8 * i < count)
                low = __ldg((const int4 *)column + 2 * i), high = __ldg((const int4 *)column + 2 * i + 1);
            int from[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            Column v[8];
#pragma unroll
            for (int c = 0; c < 8; c++) v[c] = columns[min((uint32)from[c], (uint32)k)];
#pragma unroll
            for (int r = 0; r < together; r++) {
                auto pair = [&](int c) { return side_by_side(v[c].word[r / 2], v[c + 1].word[r / 2], r % 2); };
                uint4 chunk = make_uint4(pair(0), pair(2), pair(4), pair(6));
                if (first_row + r >= m) chunk = make_uint4(0, 0, 0, 0);
                store(first_row + r, i, chunk);
            }
        }
    }
}
