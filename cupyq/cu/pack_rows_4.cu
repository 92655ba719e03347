// pack_rows_4: nibble c % 8 of words[g, c / 8] = (scales[g, c] - 1) & 15
//
// Work split  one thread per word.
// Numerics    integers.
// Limits      cols a multiple of 8; none on groups (grid x); any address.
// Traffic     groups * cols * 2.5 bytes.
// Reference   cupyq/ops/quantizing.py: pack_rows_4_reference
#include "types.cuh"

__global__ void __launch_bounds__(128) pack_rows_4(
    const short *scales,  // [groups, cols]
    uint32 *words,        // [groups, cols / 8]
    int64 count           // groups * cols / 8
) {
    int64 i = (int64)blockIdx.x * 128 + threadIdx.x;
    if (i >= count) return;
    uint32 word = 0;
    for (int nibble = 0; nibble < 8; nibble++) word |= (uint32)((scales[8 * i + nibble] - 1) & 15) << 4 * nibble;
    words[i] = word;
}
