// activate: y[i] = f(x[i]), or f(x[i]) * up[i] where is_gated, for the functions f of activation.cuh
//
// Work split  `vector` values a thread, 256 threads a block.
// Numerics    fp32 (expf and erfcf within the few ulp CUDA documents, not the approximate instructions; IEEE division),
//             one rounding at the store.
// Limits      n below 2^39; y may be x or up.
// Traffic     (is_gated ? 3 : 2) * n * sizeof(T) bytes
// Reference   cupyq/ops/activation.py: silu_reference, silu_mul_reference and so on
#include "activation.cuh"
#include "ptx.cuh"

template <typename T, int function, bool is_gated, int vector>
__global__ void __launch_bounds__(256) activate(
    const T *x,   // [n]
    const T *up,  // [n], or null where not is_gated
    T *y,         // [n]
    int64 n) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    int64 first = ((int64)blockIdx.x * 256 + threadIdx.x) * vector;
    if (first >= n) return;
    auto xs = *(const Vector<T, vector> *)(x + first);
    Vector<T, vector> ups, ys;
    if constexpr (is_gated) ups = *(const Vector<T, vector> *)(up + first);
    for (int i = 0; i < vector; i++) {
        float value = activation<function>(to_float(xs[i]));
        if constexpr (is_gated) value *= to_float(ups[i]);
        ys[i] = from_float<T>(value);
    }
    *(Vector<T, vector> *)(y + first) = ys;
}
