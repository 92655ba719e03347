// What the kernels share that write rows as the images that qmatmul_wgmma.cu wants in shared memory: where a value goes, and how
// a row that is complete in shared memory is put into stored order.
//
// Rows go to images[ceil(m / rows)][stages][rows][8 chunks], a stage 64 columns, a chunk 8 of them. Within an image, 16-byte
// chunk c of row r lies at byte 128 r + 16 (c ^ (r % 8)): the 128-byte swizzle of wgmma.
#pragma once
#include "ptx.cuh"

struct ImageRow {
    uint4 *chunks;  // of its first stage
    int step, flip;

    __device__ __forceinline__ ImageRow(uint4 *images, int row, int rows, int stages) {
        int block = row / rows, r = row - block * rows;
        chunks = images + ((int64)block * stages * rows + r) * 8;
        step = rows * 8;
        flip = r % 8;
    }
    // Of columns 8 i to 8 i + 7.
    __device__ __forceinline__ uint4 *chunk(int i) const { return chunks + (int64)(i / 8) * step + (i % 8 ^ flip); }
};

// The chunks of a row that a thread block writes: whole stages, the blockIdx.y-th part of gridDim.y.
struct Part {
    int begin, end;

    __device__ __forceinline__ explicit Part(int stages) {
        int size = (stages + gridDim.y - 1) / gridDim.y;
        begin = min((int)blockIdx.y * size, stages) * 8;
        end = min(((int)blockIdx.y + 1) * size, stages) * 8;
    }
};

__device__ __forceinline__ void clear_row(ImageRow to, Part part) {
    for (int i = part.begin + threadIdx.x; i < part.end; i += blockDim.x) *to.chunk(i) = make_uint4(0, 0, 0, 0);
}

// The part's columns of order[count], k (which is below 2^16) for those that are none, as 16-bit numbers in shared memory: half
// the bytes, and read from L2 once, not for each row. They are constants of a QMatrix: this may come before
// wait_for_previous_kernel().
__device__ __forceinline__ void load_columns(uint4 *columns, const int *order, Part part, int count, int k) {
    for (int i = part.begin + threadIdx.x; i < part.end; i += blockDim.x) {
        int4 low = make_int4(-1, -1, -1, -1), high = low;
        if (8 * i < count) low = __ldg((const int4 *)order + 2 * i), high = __ldg((const int4 *)order + 2 * i + 1);
        auto pair = [k](int first, int second) {
            return min((uint32)first, (uint32)k) | min((uint32)second, (uint32)k) << 16;
        };
        columns[i - part.begin] =
            make_uint4(pair(low.x, low.y), pair(low.z, low.w), pair(high.x, high.y), pair(high.z, high.w));
    }
}

// Writes row[columns] of a row in shared memory, of 16-bit values in chunks of 8, with zeros behind them.
__device__ __forceinline__ void gather_row(ImageRow to, const uint4 *row, const uint4 *columns, Part part) {
    const uint16 *values = (const uint16 *)row;
    auto pair = [values](uint32 from) { return values[from & 0xffff] | (uint32)values[from >> 16] << 16; };
#pragma unroll 1
    for (int i = part.begin + threadIdx.x; i < part.end; i += blockDim.x) {
        uint4 from = columns[i - part.begin];
        *to.chunk(i) = make_uint4(pair(from.x), pair(from.y), pair(from.z), pair(from.w));
    }
}

// The same of columns 0, 1, 2, ...
__device__ __forceinline__ void copy_row(ImageRow to, const uint4 *row, int row_chunks, Part part) {
    for (int i = part.begin + threadIdx.x; i < part.end; i += blockDim.x) *to.chunk(i) = row[min(i, row_chunks)];
}
