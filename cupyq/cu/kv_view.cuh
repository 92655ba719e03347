// Where the keys and values of a cache lie: contiguous, or in pages that a table names.
#pragma once
#include "ptx.cuh"

// Arrays of K and V are [pages, page_size, kv_heads, ...]; what they hold is a CacheKind (kv_codec.cuh). Without a table page b is
// sequence b whole, of any size; with one the page size is a power of two.
struct KVPages {
    const int *table;      // [batch, max_pages] or null
    int capacity;          // tokens of a sequence: max_pages << page_shift, or the page size
    int page_shift;        // with a table
    int max_pages, pages;  // columns of the table; rows of the arrays

    // Token slot, page * page_size + place, of token 0 <= t < capacity of sequence b. The row of a kv head is
    // slot * kv_heads + kv_head. A table entry outside of 0 .. pages - 1 reads as page 0.
    __device__ __forceinline__ int64 row_of(int b, int t) const {
        if (!table) return (int64)b * capacity + t;
        // Past L1: a kernel that looks ahead of its wait_for_previous_kernel() must not find the same line again after it.
        int page = __ldcg(table + (int64)b * max_pages + (t >> page_shift));
        if ((uint32)page >= (uint32)pages) page = 0;
        return ((int64)page << page_shift) + (t & (1 << page_shift) - 1);
    }
};

// 4 bytes from global to shared memory as copy_async_16: the first `bytes`, 4, 2 or 0, of them; zeros for the others, not read.
__device__ __forceinline__ void copy_async_4(void *shared, const half *global, int bytes) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
        "l"(__cvta_generic_to_global(global)), "r"(bytes)
        : "memory");
#else
    *(uint32 *)shared = bytes == 4 ? *(const uint32 *)global : bytes == 2 ? global->bits : 0;
#endif
}

// Ask for a line to come into L2. Nothing is read: what it holds may still change.
__device__ __forceinline__ void prefetch_l2(const void *p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}
