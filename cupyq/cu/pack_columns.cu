// pack_columns: bits [i * bits, (i + 1) * bits) of column c's stream = the low `bits` bits of codes[i, c]
//
// Work split  one thread per column and unit, the fewest codes that fill whole words (formats/bits.py); blockIdx.y strides
//             over the units, neighbouring threads read and write neighbouring columns.
// Numerics    integers.
// Limits      rows a multiple of 32 / gcd(32, bits); any cols, any address.
// Traffic     rows * cols * (2 + bits / 8) bytes.
// Reference   cupyq/ops/quantizing.py: pack_columns_reference
#include "types.cuh"

template <int bits>
__global__ void __launch_bounds__(128) pack_columns(
    const short *codes,  // [rows, cols]
    uint32 *words,       // [rows * bits / 32, cols]
    int units, int cols) {
    constexpr int even = bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1;  // gcd(32, bits)
    constexpr int unit_rows = 32 / even;
    static_assert(unit_rows * bits == bits / even * 32, "a unit fills whole words");
    int c = blockIdx.x * 128 + threadIdx.x;
    if (c >= cols) return;
    for (int unit = blockIdx.y; unit < units; unit += gridDim.y) {
        const short *source = codes + (int64)unit * unit_rows * cols + c;
        uint32 *target = words + (int64)unit * (bits / even) * cols + c;
        uint64 stream = 0;
        int filled = 0;
#pragma unroll
        for (int i = 0; i < unit_rows; i++) {
            stream |= (uint64)(source[(int64)i * cols] & ((1 << bits) - 1)) << filled;
            filled += bits;
            if (filled >= 32) {
                *target = (uint32)stream;
                target += cols;
                stream >>= 32;
                filled -= 32;
            }
        }
    }
}
