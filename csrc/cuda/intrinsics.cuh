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

// What compute capability 9.0 alone has. Elsewhere nobody asks for it.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

// The same value in all lanes, and in a register of the warp.
__device__ __forceinline__ int same_in_warp(int x) { return __shfl_sync(kAllLanes, x, 0); }

// Of an operand in shared memory 8 rows of 16 bytes each lie side by side, eights of rows too; those of the next 8 values of k lie `apart`
// bytes later. What the matrix units are given is the lower half of a descriptor (PTX ISA, "Matrix Descriptor", without swizzle); the upper
// one says that eight rows are 128 bytes.
struct SharedMatrix {
  unsigned low;
  __device__ __forceinline__ SharedMatrix(const unsigned char* shared, int at, int apart)
      : low((shared_address(shared) + at) >> 4 | static_cast<unsigned>(apart >> 4) << 16) {}
  __device__ __forceinline__ explicit SharedMatrix(unsigned low) : low(low) {}
  __device__ __forceinline__ SharedMatrix from(int row) const { return SharedMatrix(low + row); }
  __device__ __forceinline__ uint64_t descriptor() const { return uint64_t{128 >> 4} << 32 | low; }
};

// Four warps together: c (+)= the 64 rows of `left` times the columns of `right`, 16 values of k; of C a warp has 16 rows, as above. It is
// done once it has been waited for; neither c nor what is read may be touched before.
#define SK_FOUR(x) "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])
#define SK_SIXTEEN(c, i) SK_FOUR(c[i]), SK_FOUR(c[i + 1]), SK_FOUR(c[i + 2]), SK_FOUR(c[i + 3])
#define SK_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SK_16 SK_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SK_32 SK_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SK_64                                                                                      \
  SK_32                                                                                            \
      ", "                                                                                         \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// Of a type for so many columns: the numbers of c's operands, of the two descriptors and of what says whether c is added to; c's registers.
#define SK_MULTIPLY_ADD_SHARED(T, type, columns, of_c, of_left, of_right, of_adds, ...)                                                    \
  __device__ __forceinline__ void multiply_add_shared(T, float (&c)[columns / 8][4], SharedMatrix left, SharedMatrix right, bool adds) {               \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " of_adds ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type \
                 " {" of_c "}, " of_left ", " of_right ", adds, 1, 1, 0, 0;\n}"                                                            \
                 : __VA_ARGS__                                                                                                             \
                 : "l"(left.descriptor()), "l"(right.descriptor()), "r"(static_cast<int>(adds)));                                          \
  }
#define SK_MULTIPLY_ADD_SHARED_OF(T, type)                                                                      \
  SK_MULTIPLY_ADD_SHARED(T, type, 16, SK_8, "%8", "%9", "%10", SK_FOUR(c[0]), SK_FOUR(c[1]))                    \
  SK_MULTIPLY_ADD_SHARED(T, type, 32, SK_16, "%16", "%17", "%18", SK_SIXTEEN(c, 0))                             \
  SK_MULTIPLY_ADD_SHARED(T, type, 64, SK_32, "%32", "%33", "%34", SK_SIXTEEN(c, 0), SK_SIXTEEN(c, 4))           \
  SK_MULTIPLY_ADD_SHARED(T, type, 128, SK_64, "%64", "%65", "%66", SK_SIXTEEN(c, 0), SK_SIXTEEN(c, 4), SK_SIXTEEN(c, 8), SK_SIXTEEN(c, 12))
SK_MULTIPLY_ADD_SHARED_OF(__half, "f16")
SK_MULTIPLY_ADD_SHARED_OF(__nv_bfloat16, "bf16")
#undef SK_MULTIPLY_ADD_SHARED_OF
#undef SK_MULTIPLY_ADD_SHARED
#undef SK_64
#undef SK_32
#undef SK_16
#undef SK_8
#undef SK_SIXTEEN
#undef SK_FOUR
// What was written to registers, and by copies into shared memory, is seen by the products that follow.
__device__ __forceinline__ void before_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void copies_before_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft> __device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// A barrier in shared memory, 8 bytes: a phase ends when as many have arrived as it was opened for, and all bytes that are expected have
// come; then the next one begins. The first has parity 0, and the one before it counts as ended.
__device__ __forceinline__ void open_barrier(unsigned char* shared, int at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(shared) + at), "r"(arrivals) : "memory");
}
// To all that comes after the threads have met.
__device__ __forceinline__ void barriers_are_open() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void arrive_at(unsigned char* shared, int at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(shared) + at) : "memory");
}
__device__ __forceinline__ void arrive_expecting(unsigned char* shared, int at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(shared) + at), "r"(bytes) : "memory");
}
// When all that this thread has begun to copy is there.
__device__ __forceinline__ void arrive_after_copies(unsigned char* shared, int at) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(shared) + at) : "memory");
}
// Until the phase of this parity has ended.
__device__ __forceinline__ void wait_at(unsigned char* shared, int at, int parity) {
  asm volatile(
      "{\n.reg .pred ended;\nAGAIN_%=:\nmbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n@ended bra ENDED_%=;\nbra AGAIN_%=;\n"
      "ENDED_%=:\n}" ::"r"(shared_address(shared) + at),
      "r"(parity)
      : "memory");
}
// What others stored, and this thread has waited for, is seen by the bulk copies that it begins next.
__device__ __forceinline__ void copies_after_stores() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
// By one thread: into shared memory, both and the bytes multiples of 16; the barrier expects them.
__device__ __forceinline__ void copy_bulk(unsigned char* shared, int to, const void* from, int bytes, int at) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared) + to),
               "l"(from), "r"(bytes), "r"(shared_address(shared) + at)
               : "memory");
}
// kCount threads of the block, of which each names the same meeting, from 1 to 15.
template <int kCount> __device__ __forceinline__ void meet_others(int meeting) {
  asm volatile("bar.sync %0, %1;" ::"r"(meeting), "n"(kCount) : "memory");
}
// By all threads of a warpgroup that has kHad registers a thread.
template <int kHad, int kWanted> __device__ __forceinline__ void take_registers() {
  if constexpr (kWanted > kHad) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kWanted));
  else if constexpr (kWanted < kHad) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kWanted));
}

// The shared memory that the launch gave the block, at a multiple of 1024 bytes.
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
