// One weight to its code and back: the rounding chain that quantize and quantize_range share.
#pragma once
#include "types.cuh"

// The code, a whole number. NaN (0 / 0) becomes maxq, as fminf drops it.
__device__ __forceinline__ float quantize_code(float x, float scale, float qzero, float maxq) {
    return fmaxf(0.0f, fminf(maxq, rintf(x / scale) + qzero));
}

// RN16((code - qzero) * RN16(scale)): the product of two fp16 values is exact in fp32, so it is rounded once.
__device__ __forceinline__ float dequantize_code(float code, float scale, float qzero) {
    return to_float(from_float<half>((code - qzero) * to_float(from_float<half>(scale))));
}
