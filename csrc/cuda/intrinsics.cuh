// The matrix units, and what blocks tell each other: one function for each instruction. Of a fragment lane i has,
// with g = i / 4 and t = i % 4: of A (16 x 16) rows g and g + 8, columns 2t, 2t + 1, 2t + 8, 2t + 9; of B (16 x 8) the same rows of
// column g; of C (16 x 8) rows g and g + 8, columns 2t and 2t + 1 (PTX ISA, "Matrix fragments for mma.m16n8k16").
#pragma once

#include "common.cuh"

// tests/cuda_on_host has the same for the host.
#ifdef __CUDACC__

namespace sk::cuda {

// Four matrices of 8 rows of 16 bytes: lane i gives the place of row i % 8 of matrix i / 8, in bytes from `base` on, and gets of each
// matrix the two values 2t and 2t + 1 of row g.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const unsigned char* base, int row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(base) + row)
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

// Four warps together, on compute capability 9.0 alone: the same product with 16 rows of A of each warp, as above, and all columns of B,
// out of shared memory: rows of 64 bytes, of which 32 from `rows` bytes after `base` on are meant, in the order of place<64>, the first at
// a multiple of 512 bytes. c += a b is done once it has been waited for; neither c nor a is to be touched before.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kFourWarpsTogether = true;
// Address; rows in groups of eight that are 512 bytes apart; swizzled in 64 bytes (PTX ISA, "Matrix descriptor").
__device__ __forceinline__ uint64_t matrix_descriptor(const unsigned char* base, int rows) {
  return uint64_t{(shared_address(base) + rows) >> 4 & 0x3fff} | uint64_t{1} << 16 | uint64_t{512 >> 4} << 32 | uint64_t{2} << 62;
}
#define SK_FOUR(x) "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])
#define SK_SIXTEEN(c, i) SK_FOUR(c[i]), SK_FOUR(c[i + 1]), SK_FOUR(c[i + 2]), SK_FOUR(c[i + 3])
#define SK_32                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SK_64                                                                            \
  SK_32                                                                                  \
      ", "                                                                               \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// Of a type for so many columns: the numbers of c's operands, of a's and of b's, and c's registers.
#define SK_MULTIPLY_ADD_WIDE(T, type, columns, of_c, of_a, of_b, ...)                                                                   \
  __device__ __forceinline__ void multiply_add_wide(T, float (&c)[columns / 8][4], const uint32_t (&a)[4], const unsigned char* base,   \
                                                    int rows) {                                                                         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" of_c "}, {" of_a "}, " of_b ", 1, 1, 1, 0;" \
                 : __VA_ARGS__                                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(matrix_descriptor(base, rows)));                                     \
  }
#define SK_MULTIPLY_ADD_WIDE_OF(T, type)                                                                                       \
  SK_MULTIPLY_ADD_WIDE(T, type, 64, SK_32, "%32, %33, %34, %35", "%36", SK_SIXTEEN(c, 0), SK_SIXTEEN(c, 4))                    \
  SK_MULTIPLY_ADD_WIDE(T, type, 128, SK_64, "%64, %65, %66, %67", "%68", SK_SIXTEEN(c, 0), SK_SIXTEEN(c, 4), SK_SIXTEEN(c, 8), \
                       SK_SIXTEEN(c, 12))
SK_MULTIPLY_ADD_WIDE_OF(__half, "f16")
SK_MULTIPLY_ADD_WIDE_OF(__nv_bfloat16, "bf16")
#undef SK_MULTIPLY_ADD_WIDE_OF
#undef SK_MULTIPLY_ADD_WIDE
#undef SK_64
#undef SK_32
#undef SK_SIXTEEN
#undef SK_FOUR
// What was written to registers, and by copies into shared memory, is seen by the products that follow.
__device__ __forceinline__ void before_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void copies_before_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft> __device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
#else
constexpr bool kFourWarpsTogether = false;
template <class T, int kAlong>
__device__ __forceinline__ void multiply_add_wide(T, float (&)[kAlong][4], const uint32_t (&)[4], const unsigned char*, int) {}
__device__ __forceinline__ void before_products() {}
__device__ __forceinline__ void copies_before_products() {}
__device__ __forceinline__ void close_products() {}
template <int kLeft> __device__ __forceinline__ void wait_for_products() {}
#endif

// The shared memory that the launch gave the block, where such rows begin at multiples of 512 bytes.
__device__ __forceinline__ unsigned char* shared_matrices() {
  extern __shared__ __align__(1024) unsigned char matrices[];
  return matrices;
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

}  // namespace sk::cuda

#endif
