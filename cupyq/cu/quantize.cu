// quantize: code = clamp(rint(x[r, c] / scale[c]) + qzero, 0, maxq), y[r, c] = RN16((code - qzero) * RN16(scale[c]))
//
// Work split  `vector` columns per thread, whose scales stay in registers while blockIdx.y strides over the rows.
// Numerics    fp32 division, ties to even; the rest is exact but for the fp16 rounding of the scale and of the product.
// Limits      |qzero|, maxq <= 2048 (exact in fp16); any rows and cols; y may be x; codes may be null.
// Traffic     rows * cols * (8 + 2 where codes are written) bytes.
// Reference   cupyq/ops/quantizing.py: quantize_reference
#include "quantize.cuh"

template <int vector>
__global__ void __launch_bounds__(128) quantize(
    const float *x,      // [rows, cols]
    const float *scale,  // [cols]
    float *y,            // [rows, cols]
    short *codes,        // [rows, cols] or null
    int rows, int cols, float qzero, float maxq) {
    int c = (blockIdx.x * 128 + threadIdx.x) * vector;
    if (c >= cols) return;
    auto scales = *(const Vector<float, vector> *)(scale + c);
    for (int r = blockIdx.y; r < rows; r += gridDim.y) {
        int64 at = (int64)r * cols + c;
        auto values = *(const Vector<float, vector> *)(x + at);
        Vector<short, vector> kept;
        for (int i = 0; i < vector; i++) {
            float code = quantize_code(values[i], scales[i], qzero, maxq);
            kept[i] = (short)code;
            values[i] = dequantize_code(code, scales[i], qzero);
        }
        *(Vector<float, vector> *)(y + at) = values;
        if (codes) *(Vector<short, vector> *)(codes + at) = kept;
    }
}
