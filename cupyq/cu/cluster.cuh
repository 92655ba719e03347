// What blocks of a cluster share (sm_90 on): a barrier, and each other's shared memory. One tiny wrapper per PTX instruction.
// Source: PTX ISA, "barrier.cluster", "membar / fence", "mapa", "State Space: Shared".
#pragma once
#include "ptx.cuh"

// Of a kernel: blocks 8 * i to 8 * i + 7 are a cluster, which every GPU that has clusters can hold.
#if __CUDA_ARCH__ >= 900
#define CLUSTER_OF_8 __cluster_dims__(8, 1, 1)
#else
#define CLUSTER_OF_8
#endif

// All threads of all blocks of the cluster arrive; the wait returns once they have.
__device__ __forceinline__ void arrive_in_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same, and after the wait all blocks can read what this thread wrote to its own block's shared memory. An ordinary release would
// wait for stores to global memory as well, the last of which may be on their way to another GPU.
__device__ __forceinline__ void arrive_and_publish_in_cluster() {
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208  // PTX ISA 8.6
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
    arrive_in_cluster();
#else
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// Where block number `block` of the cluster has what is at `p` in the shared memory of this one.
__device__ __forceinline__ uint32 cluster_address(const void *p, uint32 block) {
    uint32 address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(block));
    return address;
}
__device__ __forceinline__ float load_from_cluster(uint32 address) {
    float v;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ float4 load_four_from_cluster(uint32 address) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
        : "r"(address)
        : "memory");
    return v;
}
