// Hopper's own instructions (sm_90a), one tiny wrapper each: products of a warpgroup whose first operand is in registers and
// whose second is in shared memory, barriers in shared memory, bulk copies. PTX ISA: "Asynchronous Warpgroup Level Matrix
// Instructions", "mbarrier", "cp.async.bulk", "setmaxnreg".
#pragma once
#include "ptx.cuh"

// --- products ---
//
// D += A B^T for one 64 x rows x 16 tile, fp32 accumulation, without waiting for the result. Warp w of the warpgroup holds
// rows 16w .. 16w+15 of A and D; lane = 4 * group + t holds
//   a[0] = A[group][2t, 2t+1]      a[1] = A[group + 8][2t, 2t+1]
//   a[2] = A[group][2t+8, 2t+9]    a[3] = A[group + 8][2t+8, 2t+9]
//   d[4i], d[4i+1] = D[group][8i + 2t, 8i + 2t + 1]      d[4i+2], d[4i+3] = D[group + 8][8i + 2t, 8i + 2t + 1]
// Until wgmma_wait says that it is done, nobody may touch d, a or the shared memory of B.

// B [rows, 64] of 16-bit values in shared memory, at a multiple of 1024 bytes: row r takes bytes 128 r .. 128 r + 127, and its
// 16-byte chunk c lies where chunk c ^ (r % 8) would ("128-byte swizzle", K-major). Adding 2 goes on by 16 columns.
//   bits 0-13 address / 16, 16-29 unused where swizzled so, 32-45 bytes between groups of 8 rows / 16, 62-63 = 1: the swizzle
__device__ __forceinline__ uint32 wgmma_descriptor(uint32 shared) { return 1u << 16 | (shared & 0x3ffff) >> 4; }
// B^T [16, rows] in shared memory: column block c (64 columns, 128 bytes) of row r at c * block_bytes + 128 r, swizzled as
// above ("MN-major": bits 16-29 are now the bytes between column blocks / 16). Adding 128 goes on by 16 rows.
__device__ __forceinline__ uint32 wgmma_transposed_descriptor(uint32 shared, uint32 block_bytes) {
    return block_bytes >> 4 << 16 | (shared & 0x3ffff) >> 4;
}
// The upper half is the same for all.
__device__ __forceinline__ uint64 wgmma_descriptor_of(uint32 low) {
    return (uint64)(1u << 30 | 1024u >> 4) << 32 | low;
}

// The same with A from shared memory, K-major as B: rows 128 bytes apart, a warp's rows 16 after those of the warp before.
// Where `accumulates` is false, D = A B^T: d need not hold anything.
//
// And with B^T as rows: B^T [16, rows] of 16-bit values as `wgmma_transposed_descriptor` says. d + first is what is added to.
#define ACCUMULATORS_8(i)                                                                       \
    "+f"(d[first + i]), "+f"(d[first + i + 1]), "+f"(d[first + i + 2]), "+f"(d[first + i + 3]), \
        "+f"(d[first + i + 4]), "+f"(d[first + i + 5]), "+f"(d[first + i + 6]), "+f"(d[first + i + 7])
#define ACCUMULATORS_16 ACCUMULATORS_8(0), ACCUMULATORS_8(8)
#define ACCUMULATORS_32 ACCUMULATORS_16, ACCUMULATORS_8(16), ACCUMULATORS_8(24)
#define ACCUMULATORS_64 ACCUMULATORS_32, ACCUMULATORS_8(32), ACCUMULATORS_8(40), ACCUMULATORS_8(48), ACCUMULATORS_8(56)
#define ACCUMULATORS_128                                                                             \
    ACCUMULATORS_64, ACCUMULATORS_8(64), ACCUMULATORS_8(72), ACCUMULATORS_8(80), ACCUMULATORS_8(88), \
        ACCUMULATORS_8(96), ACCUMULATORS_8(104), ACCUMULATORS_8(112), ACCUMULATORS_8(120)
#define REGISTERS_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define REGISTERS_32 REGISTERS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGISTERS_64                                                                                               \
    REGISTERS_32                                                                                                   \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58" \
    ",%59,%60,%61,%62,%63"
#define REGISTERS_128                                                                                                 \
    REGISTERS_64                                                                                                      \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%"  \
    "91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%" \
    "115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define PRODUCT(n, type, registers, operands, ...)                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers "}, " operands \
        : __VA_ARGS__                                                                                          \
        : INPUTS)

// A in registers: its four and B's descriptor follow the accumulators; 1: add, 1, 1: no sign changes, then whether B is B^T.
#define INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor)
#define PRODUCTS(type, is_transposed)                                                                                \
    if constexpr (rows == 32)                                                                                        \
        PRODUCT(32, type, REGISTERS_16, "{%16, %17, %18, %19}, %20, 1, 1, 1, " is_transposed ";", ACCUMULATORS_16);  \
    else if constexpr (rows == 64)                                                                                   \
        PRODUCT(64, type, REGISTERS_32, "{%32, %33, %34, %35}, %36, 1, 1, 1, " is_transposed ";", ACCUMULATORS_32);  \
    else if constexpr (rows == 128)                                                                                  \
        PRODUCT(128, type, REGISTERS_64, "{%64, %65, %66, %67}, %68, 1, 1, 1, " is_transposed ";", ACCUMULATORS_64); \
    else                                                                                                             \
        PRODUCT(                                                                                                     \
            256, type, REGISTERS_128, "{%128, %129, %130, %131}, %132, 1, 1, 1, " is_transposed ";",                 \
            ACCUMULATORS_128);

template <typename T, int rows>
__device__ __forceinline__ void wgmma_add(float (&d)[rows / 2], const uint32 (&a)[4], uint64 b_descriptor) {
    static_assert(rows == 32 || rows == 64 || rows == 128 || rows == 256, "sizes written out above");
    constexpr int first = 0;
    if constexpr (is_same<T, half>) {
        PRODUCTS("f16", "0")
    } else {
        PRODUCTS("bf16", "0")
    }
}
template <typename T, int rows, int first = 0, int size>
__device__ __forceinline__ void wgmma_add_transposed(float (&d)[size], const uint32 (&a)[4], uint64 b_descriptor) {
    static_assert(rows == 32 || rows == 64 || rows == 128 || rows == 256, "sizes written out above");
    static_assert(first + rows / 2 <= size, "within d");
    if constexpr (is_same<T, half>) {
        PRODUCTS("f16", "1")
    } else {
        PRODUCTS("bf16", "1")
    }
}
#undef PRODUCTS
#undef INPUTS

#define INPUTS "l"(a_descriptor), "l"(b_descriptor), "n"(int(accumulates))
#define PRODUCTS(type)                                                                  \
    if constexpr (rows == 64)                                                           \
        PRODUCT(64, type, REGISTERS_32, "%32, %33, %34, 1, 1, 0, 0;", ACCUMULATORS_32); \
    else                                                                                \
        PRODUCT(128, type, REGISTERS_64, "%64, %65, %66, 1, 1, 0, 0;", ACCUMULATORS_64);

template <typename T, int rows, bool accumulates>
__device__ __forceinline__ void wgmma_shared(float (&d)[rows / 2], uint64 a_descriptor, uint64 b_descriptor) {
    static_assert(rows == 64 || rows == 128, "sizes written out above");
    constexpr int first = 0;
    if constexpr (is_same<T, half>) {
        PRODUCTS("f16")
    } else {
        PRODUCTS("bf16")
    }
}
#undef PRODUCTS
#undef INPUTS
#undef PRODUCT
#undef REGISTERS_128
#undef REGISTERS_64
#undef REGISTERS_32
#undef REGISTERS_16
#undef ACCUMULATORS_128
#undef ACCUMULATORS_64
#undef ACCUMULATORS_32
#undef ACCUMULATORS_16
#undef ACCUMULATORS_8

// Computed by now, and used no earlier than here: the compiler moves neither across a wait for products.
template <int size> __device__ __forceinline__ void settled(float (&d)[size]) {
#pragma unroll
    for (int i = 0; i < size; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Before the first product, and after anything else has written registers that the next ones use.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Close a group of products / wait until at most `pending` groups of this warpgroup are unfinished.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// --- barriers in shared memory ---
//
// A barrier's phase ends when `count` arrivals have come and all bytes that were announced have been copied.

__device__ __forceinline__ void barrier_init(uint32 barrier, uint32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// After the last init, before __syncthreads(): bulk copies see the barriers too.
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(uint32 barrier, uint32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrive once everything this thread has copied with copy_async_16 is there.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Whether the phase of this parity has ended (the one before the first counts as parity 1, and has). May wait a little.
__device__ __forceinline__ bool barrier_has_passed(uint32 barrier, uint32 parity) {
    uint32 has_passed;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(has_passed)
        : "r"(barrier), "r"(parity)
        : "memory");
    return has_passed;
}
// A wait that nobody ends becomes an error after some seconds, not a GPU that hangs: a store to address 0. A trap would do so
// too, but ptxas then merges the exits of warpgroups with different numbers of registers, and gives all of them the least.
__device__ __forceinline__ void barrier_wait(uint32 barrier, uint32 parity) {
    for (uint32 tries = 0; !barrier_has_passed(barrier, parity); tries++)
        if (tries == 1u << 28) asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(tries) : "memory");
}

// Threads of some warps only; id 1 to 15, count a multiple of 32.
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Come to a named barrier without waiting at it.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// What another thread block has counted, and all that it wrote before.
__device__ __forceinline__ uint32 load_acquire(const uint32 *p) {
    uint32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)) : "memory");
    return v;
}

// --- reading and writing shared memory ---

__device__ __forceinline__ uint4 load_shared_16(uint32 shared) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "r"(shared)
        : "memory");
    return v;
}
__device__ __forceinline__ uint2 load_shared_8(uint32 shared) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(shared) : "memory");
    return v;
}
__device__ __forceinline__ uint32 load_shared_4(uint32 shared) {
    uint32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared) : "memory");
    return v;
}
__device__ __forceinline__ uint32 load_shared_2(uint32 shared) {
    uint16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(shared) : "memory");
    return v;
}

__device__ __forceinline__ void store_shared_16(uint32 shared, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
        : "memory");
}
__device__ __forceinline__ void store_shared_4(uint32 shared, uint32 v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(v) : "memory");
}

// The same value, of which the compiler no longer knows where it comes from, so that it does not compute it again.
__device__ __forceinline__ uint32 kept(uint32 x) {
    asm volatile("mov.b32 %0, %0;" : "+r"(x));
    return x;
}

// The low or the high half of a pair, in both halves.
__device__ __forceinline__ uint32 both_low(uint32 pair) {
    uint32 y;
    asm("prmt.b32 %0, %1, %1, 0x1010;" : "=r"(y) : "r"(pair));
    return y;
}
__device__ __forceinline__ uint32 both_high(uint32 pair) {
    uint32 y;
    asm("prmt.b32 %0, %1, %1, 0x3232;" : "=r"(y) : "r"(pair));
    return y;
}

// --- bulk copies ---

// `bytes` from global to shared memory; addresses and size are multiples of 16. The barrier must have been told to expect them.
__device__ __forceinline__ void copy_bulk(uint32 shared, const void *global, uint32 bytes, uint32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(barrier)
        : "memory");
}
// What cuTensorMapEncodeTiled makes of an array: opaque, a kernel parameter (const __grid_constant__) that must lie at a multiple
// of 64 bytes, which _tensor_maps.py sees to: alignas(64) would move the parameter to where no caller can know.
struct TensorMap {
    uint64 words[16];
};
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// The box of an array at these coordinates, innermost first. What lies outside of the array becomes zeros; the barrier is told
// of the bytes of the whole box in any case.
__device__ __forceinline__ void copy_box(uint32 shared, const TensorMap *map, int x, int y, int z, uint32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
        "[%5];" ::"r"(shared),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void copy_box(
    uint32 shared, const TensorMap *map, int x, int y, int z, int u, uint32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
        "%5}], "
        "[%6];" ::"r"(shared),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(u), "r"(barrier)
        : "memory");
}
// What ordinary stores have written may now be read by bulk copies and by wgmma.
__device__ __forceinline__ void fence_bulk() { asm volatile("fence.proxy.async;" ::: "memory"); }

// The same of shared memory alone, and much faster.
__device__ __forceinline__ void fence_bulk_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- registers ---
//
// Warpgroups of one thread block may share registers unevenly. Every warp of the warpgroup must come here.

template <int count> __device__ __forceinline__ void give_registers_back() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
