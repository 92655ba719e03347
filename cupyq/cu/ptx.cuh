// One tiny wrapper per PTX instruction, with what it is for. Instruction shapes: PTX ISA, "Matrix fragments for mma".
#pragma once
#include "types.cuh"

// D += A * B for one 16 x 8 x 16 tile, fp32 accumulation. Lane = 4 * group + t (group 0..7, t 0..3) holds
//   a[0] = A[group][2t, 2t+1]      a[1] = A[group + 8][2t, 2t+1]
//   a[2] = A[group][2t+8, 2t+9]    a[3] = A[group + 8][2t+8, 2t+9]
//   b[0] = B[2t, 2t+1][group]      b[1] = B[2t+8, 2t+9][group]
//   d[0], d[1] = D[group][2t, 2t+1]      d[2], d[3] = D[group + 8][2t, 2t+1]
template <typename T> __device__ __forceinline__ void mma_16x8x16(
    float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2]);

template <>
__device__ __forceinline__ void mma_16x8x16<half>(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // Turing has the k = 8 shape only; its fragments are the two halves of the k = 16 ones
    for (int h = 0; h < 2; h++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[2 * h]), "r"(a[2 * h + 1]), "r"(b[h]));
#endif
}

// Turing multiplies no bfloat16: exchange the fragments between lanes and use fp32 FMA (slow, correct). Not inlined: a
// kernel holds dozens of products, and ptxas then takes minutes and spills.
__device__ __noinline__ float4 mma_16x8x16_bfloat16_by_fma(float4 d, uint4 a, uint2 b) {
    int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
    for (int h = 0; h < 2; h++)
        for (int s = 0; s < 4; s++) {
            uint32 a_low = __shfl_sync(0xffffffffu, h ? a.z : a.x, 4 * group + s);
            uint32 a_high = __shfl_sync(0xffffffffu, h ? a.w : a.y, 4 * group + s);
            uint32 b_even = __shfl_sync(0xffffffffu, h ? b.y : b.x, 4 * (2 * t) + s);
            uint32 b_odd = __shfl_sync(0xffffffffu, h ? b.y : b.x, 4 * (2 * t + 1) + s);
            for (int e = 0; e < 2; e++) {  // the pair's low, then high value
                auto value = [e](uint32 pair) { return __uint_as_float(e ? pair & 0xffff0000u : pair << 16); };
                d.x = fmaf(value(a_low), value(b_even), d.x);
                d.y = fmaf(value(a_low), value(b_odd), d.y);
                d.z = fmaf(value(a_high), value(b_even), d.z);
                d.w = fmaf(value(a_high), value(b_odd), d.w);
            }
        }
    return d;
}

template <>
__device__ __forceinline__ void mma_16x8x16<bfloat16>(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    float4 sum = mma_16x8x16_bfloat16_by_fma(
        make_float4(d[0], d[1], d[2], d[3]), make_uint4(a[0], a[1], a[2], a[3]), make_uint2(b[0], b[1]));
    d[0] = sum.x, d[1] = sum.y, d[2] = sum.z, d[3] = sum.w;
#endif
}

__device__ __forceinline__ uint32 shared_address(const void *p) { return (uint32)__cvta_generic_to_shared(p); }

// Four 8 x 8 matrices of 16-bit values from shared memory into mma fragments. Lane i points to row i % 8 of matrix i / 8
// (16 aligned bytes). `transposed` also transposes each matrix on the way.
template <bool transposed = false>
__device__ __forceinline__ void ldmatrix_x4(uint32 (&r)[4], uint32 shared_row) {
    if constexpr (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
            : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
            : "r"(shared_row)
            : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
            : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
            : "r"(shared_row)
            : "memory");
}
template <bool transposed = false>
__device__ __forceinline__ void ldmatrix_x4(uint32 (&r)[4], const void *row) {
    ldmatrix_x4<transposed>(r, shared_address(row));
}

// 16 bytes from global to shared memory without passing through registers; zeros where `is_valid` is false (the source is
// then not read). Turing copies through registers, at once.
__device__ __forceinline__ void copy_async_16(void *shared, const void *global, bool is_valid = true) {
#if __CUDA_ARCH__ >= 800
    int bytes = is_valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
        "l"(__cvta_generic_to_global(global)), "r"(bytes)
        : "memory");
#else
    *(uint4 *)shared = is_valid ? *(const uint4 *)global : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void copy_async_16(uint32 shared, const void *global) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(__cvta_generic_to_global(global))
        : "memory");
#else
    uint4 v = *(const uint4 *)global;
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
        : "memory");
#endif
}

// Close a group of asynchronous copies / wait until at most `pending` groups are unfinished.
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int pending> __device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// 16-byte load that will not be read again: past L1, first to leave L2 (weights are streamed once a step).
__device__ __forceinline__ uint4 load_streaming(const uint4 *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(__cvta_generic_to_global(p)));
    return v;
}
__device__ __forceinline__ uint2 load_streaming(const uint2 *p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
        : "=r"(v.x), "=r"(v.y)
        : "l"(__cvta_generic_to_global(p)));
    return v;
}
__device__ __forceinline__ uint32 load_streaming(const uint32 *p) {
    uint32 v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)));
    return v;
}

// (x & mask) | bits and (x & mask) ^ bits, in one instruction each.
__device__ __forceinline__ uint32 and_or(uint32 x, uint32 mask, uint32 bits) {
    uint32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
    return y;
}
__device__ __forceinline__ uint32 and_xor(uint32 x, uint32 mask, uint32 bits) {
    uint32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
    return y;
}

// x * y + z on two fp16 values at once, each rounded once.
__device__ __forceinline__ uint32 fma_half2(uint32 x, uint32 y, uint32 z) {
    uint32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(y), "r"(z));
    return r;
}
__device__ __forceinline__ uint32 sub_half2(uint32 x, uint32 y) {
    uint32 r;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
    return r;
}
__device__ __forceinline__ uint32 mul_half2(uint32 x, uint32 y) {
    uint32 r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
    return r;
}
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ uint32 fma_bfloat162(uint32 x, uint32 y, uint32 z) {
    uint32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(y), "r"(z));
    return r;
}
#else
__device__ uint32 fma_bfloat162(uint32 x, uint32 y, uint32 z);  // declared for discarded branches; Turing has none
#endif

// Programmatic dependent launch (sm_90 on; PTX ISA: griddepcontrol). A kernel launched so may start while the one before it in
// the stream still runs. Until this wait returns, only memory that no other kernel writes may be read, and none written.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's thread blocks onto the multiprocessors as soon as every block of this one has come here or ended: it
// reads its weights ahead while this kernel, and perhaps those before it, still work. Sound even before this kernel's own wait:
// the next one's wait returns when this kernel has ended, which it does not before the one before it has.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
