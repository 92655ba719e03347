// Number types of every kernel. No CUDA header is included: NVRTC then needs no include folder, and compiles faster.
//
// half and bfloat16 are storage types (16 bits, no arithmetic of their own): kernels compute in float and convert with
// to_float / from_float<T> (round to nearest even). 16-bit pair arithmetic lives in ptx.cuh.
#pragma once

typedef unsigned char uint8;
typedef signed char int8;
typedef unsigned short uint16;
typedef unsigned int uint32;
typedef unsigned long long uint64;
typedef long long int64;

struct half {
    uint16 bits;
};
struct bfloat16 {
    uint16 bits;
};

template <typename A, typename B> constexpr bool is_same = false;
template <typename A> constexpr bool is_same<A, A> = true;

// N values that travel in one memory access; the pointer must be aligned to the whole vector.
template <typename T, int N> struct alignas(sizeof(T) * N) Vector {
    T at[N];
    __device__ __forceinline__ T &operator[](int i) { return at[i]; }
    __device__ __forceinline__ const T &operator[](int i) const { return at[i]; }
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ __forceinline__ float to_float(bfloat16 x) { return __uint_as_float((uint32)x.bits << 16); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ half from_float<half>(float x) {
    half y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <> __device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
    bfloat16 y;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    uint32 u = __float_as_uint(x);
    bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
    y.bits = is_nan ? 0x7fff : (uint16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
#endif
    return y;
}

// Two values as one 32-bit register, `low` in the low half: the operand form of mma and of 16-bit pair arithmetic.
template <typename T> __device__ __forceinline__ uint32 pack_pair(float low, float high) {
    return (uint32)from_float<T>(low).bits | (uint32)from_float<T>(high).bits << 16;
}

__device__ __forceinline__ float infinity_float() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ float nan_float() { return __uint_as_float(0x7fffffffu); }
