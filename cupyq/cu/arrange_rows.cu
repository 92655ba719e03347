// arrange_rows: images[b][s][r][j] = x[rows * b + r, order[64 s + j]], 0 where that is -1 and beyond the end: activations in the
//               stored row order of a QMatrix, as the images of arrange.cuh
//
// Work split  slots > 0: as many thread blocks as fit the GPU take every gridDim.x-th row each, and of it the blockIdx.y-th part.
//             They copy a row to shared memory and gather it from there, a chunk of 8 columns a thread at a time. With two
//             slots the next row is on its way meanwhile; with one, several thread blocks on a multiprocessor take turns.
//             slots = 0: a chunk a thread, read where it is.
// Numerics    copies.
// Limits      count a multiple of 32; rows one of 8; k a multiple of 8; any address of x. slots > 0: k below 2^16,
//             16 * (chunks of a part + slots * (k / 8 + 1)) bytes of shared memory. order null: identity, slots = 0, k = count.
// Traffic     m * (k + count) * 2 bytes; count * 4 bytes per thread block, from L2.
// Reference   cupyq/ops/arrange.py: arrange_rows_reference
#include "arrange.cuh"

template <int slots>
__global__ void __launch_bounds__(slots > 0 ? 1024 : 256) arrange_rows(
    const uint16 *x,                                       // [m, k]
    const int *order,                                      // [count], or null
    uint4 *images,                                         // [ceil(m / rows), ceil(count / 64), rows, 8 chunks]
    int m, int k, int count, int rows, bool is_aligned) {  // x: to 16 bytes
    extern __shared__ uint4 shared[];
    int stages = (count + 63) / 64, all_rows = (m + rows - 1) / rows * rows;
    Part part(stages);
    let_next_kernel_start();
    if constexpr (slots == 0) {
        wait_for_previous_kernel();
        for (int row = blockIdx.x; row < all_rows; row += gridDim.x) {
            ImageRow to(images, row, rows, stages);
            const uint16 *from = x + (int64)row * k;
            auto value = [&](int at) {
                int c = order ? order[at] : at;
                return c < 0 ? 0u : (uint32)from[c];
            };
            auto pair = [&](int at) { return value(at) | value(at + 1) << 16; };
            for (int i = part.begin + threadIdx.x; i < part.end; i += blockDim.x) {
                uint4 chunk = make_uint4(0, 0, 0, 0);
                if (row < m && 8 * i < count)
                    chunk = !order && is_aligned
                                ? ((const uint4 *)from)[i]
                                : make_uint4(pair(8 * i), pair(8 * i + 2), pair(8 * i + 4), pair(8 * i + 6));
                *to.chunk(i) = chunk;
            }
        }
    } else {
        uint4 *columns = shared, *held = columns + (part.end - part.begin);
        int row_chunks = k / 8;
        load_columns(columns, order, part, count, k);
        for (int s = threadIdx.x; s < slots; s += blockDim.x)
            held[s * (row_chunks + 1) + row_chunks] = make_uint4(0, 0, 0, 0);
        wait_for_previous_kernel();
        auto slot_of = [&](int turn) { return held + turn % slots * (row_chunks + 1); };
        auto copy = [&](int row, int turn) {
            uint4 *slot = slot_of(turn);
            const uint16 *from = x + (int64)row * k;
            if (row < m && is_aligned)
                for (int i = threadIdx.x; i < row_chunks; i += blockDim.x) copy_async_16(slot + i, from + 8 * i);
            else if (row < m)
                for (int c = threadIdx.x; c < k; c += blockDim.x) ((uint16 *)slot)[c] = from[c];
            copy_async_commit();
        };
        copy(blockIdx.x, 0);
        for (int row = blockIdx.x, turn = 0; row < all_rows; row += gridDim.x, turn++) {
            if (slots > 1) copy(row + gridDim.x, turn + 1);
            copy_async_wait<slots - 1>();
            __syncthreads();
            ImageRow to(images, row, rows, stages);
            if (row < m)
                gather_row(to, slot_of(turn), columns, part);
            else
                clear_row(to, part);
            __syncthreads();
            if (slots == 1) copy(row + gridDim.x, turn + 1);
        }
    }
}
