// Philox4x32-10: 128 random bits as a pure function of a 128-bit counter and a 64-bit key; no state to keep.
// Source: Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011. NumPy: ops/philox.py.
#pragma once
#include "types.cuh"

// The counter is replaced by the random words.
__device__ __forceinline__ void philox4x32(uint32 (&counter)[4], uint32 key_low, uint32 key_high) {
    for (int round = 0; round < 10; round++) {
        uint32 low_0 = 0xD2511F53u * counter[0], high_0 = __umulhi(0xD2511F53u, counter[0]);
        uint32 low_2 = 0xCD9E8D57u * counter[2], high_2 = __umulhi(0xCD9E8D57u, counter[2]);
        counter[0] = high_2 ^ counter[1] ^ key_low;
        counter[1] = low_2;
        counter[2] = high_0 ^ counter[3] ^ key_high;
        counter[3] = low_0;
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
}

// 64 random bits of one step of one seed: two words, from word 0 or 2, of counter (step, 0) under key seed.
__device__ __forceinline__ uint64 philox_bits(uint64 seed, uint64 step, int word = 0) {
    uint32 words[4] = {(uint32)step, (uint32)(step >> 32), 0, 0};
    philox4x32(words, (uint32)seed, (uint32)(seed >> 32));
    return word == 0 ? (uint64)words[1] << 32 | words[0] : (uint64)words[3] << 32 | words[2];
}
