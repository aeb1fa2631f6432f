// The matrix units, and what blocks tell each other: one function for each instruction. Of a fragment lane i has,
// with g = i / 4 and t = i % 4: of A (16 x 16) rows g and g + 8, columns 2t, 2t + 1, 2t + 8, 2t + 9; of B (16 x 8) the same rows of
// column g; of C (16 x 8) rows g and g + 8, columns 2t and 2t + 1 (PTX ISA, "Matrix fragments for mma.m16n8k16").
#pragma once

#include "common.cuh"

// tests/cuda_on_host has the same for the host.
#ifdef __CUDACC__

namespace sk::cuda {

// Four matrices of 8 rows of 16 bytes: lane i gives the address of row i % 8 of matrix i / 8, and gets of each matrix the two values
// 2t and 2t + 1 of row g.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b.
__device__ __forceinline__ void multiply_add(__half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_add(__nv_bfloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What other blocks wrote in this launch: out of the L2 cache, which all share.
template <class V> __device__ __forceinline__ V load_fresh(const V* p) { return __ldcg(p); }

// A count that other blocks add to; what they wrote before is seen after it.
__device__ __forceinline__ unsigned read_count(const unsigned* p) {
  unsigned n;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(n) : "l"(p) : "memory");
  return n;
}
// What this block wrote before it met is seen by whoever sees the count; what they wrote before they added to it, by this thread.
__device__ __forceinline__ unsigned add_to_count(unsigned* p) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], 1;" : "=r"(before) : "l"(p) : "memory");
  return before;
}
// A number that nobody else gets; it says nothing of what others wrote.
__device__ __forceinline__ unsigned take_number(unsigned* p) { return atomicAdd(p, 1u); }
__device__ __forceinline__ void wait_a_little() { __nanosleep(100); }

// Of a cluster; launched where there are clusters alone.
__device__ __forceinline__ int block_in_cluster() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// What block `rank` has where this block has *p, in shared memory.
__device__ __forceinline__ float load_of_block(const float* p, int rank) {
  float value = 0;
#if __CUDA_ARCH__ >= 900
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
#endif
  return value;
}

}  // namespace sk::cuda

#endif
