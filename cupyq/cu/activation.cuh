// Activation functions in fp32, written without cancellation. At -Inf, where the formulas say Inf / Inf or Inf * 0, they
// give their limit, -0, which is also what the largest finite negative number gives. NaN stays NaN.
#pragma once
#include "types.cuh"

enum Activation { SILU, GELU, GELU_TANH, RELU };

// SILU       x * sigmoid(x)
// GELU       x / 2 * (1 + erf(x / sqrt(2))), which is x / 2 * erfc(-x / sqrt(2))
// GELU_TANH  x / 2 * (1 + tanh(u)), u = sqrt(2 / pi) * (x + 0.044715 x^3), which is x * sigmoid(2 u): no 1 - 0.999... for
//            negative x
// RELU       x < 0 ? 0 : x, which keeps NaN and -0
template <int function> __device__ __forceinline__ float activation(float x) {
    const float lowest = -3.402823466e38f;
    float finite = x < lowest ? lowest : x;
    if constexpr (function == RELU) {
        return x < 0.0f ? 0.0f : x;
    } else if constexpr (function == GELU) {
        return 0.5f * finite * erfcf(-0.7071067811865476f * finite);
    } else if constexpr (function == GELU_TANH) {
        float u = 0.7978845608028654f * (finite + 0.044715f * finite * finite * finite);
        return finite / (1.0f + expf(-2.0f * u));
    } else {
        return finite / (1.0f + expf(-finite));
    }
}
