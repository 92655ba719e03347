// Activation functions in fp32, written without cancellation; Inf and NaN come out as in the formula's own arithmetic.
#pragma once
#include "types.cuh"

// x * sigmoid(x)
__device__ __forceinline__ float silu_float(float x) { return x / (1.0f + expf(-x)); }

// is_tanh: x / 2 * (1 + tanh(u)), u = sqrt(2 / pi) * (x + 0.044715 x^3), which is x * sigmoid(2 u): no 1 - 0.999... for
// negative x. Else x / 2 * (1 + erf(x / sqrt(2))), which is x / 2 * erfc(-x / sqrt(2)).
template <bool is_tanh> __device__ __forceinline__ float gelu_float(float x) {
    if constexpr (is_tanh) {
        float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
        return x / (1.0f + expf(-2.0f * u));
    } else {
        return 0.5f * x * erfcf(-0.7071067811865476f * x);
    }
}
