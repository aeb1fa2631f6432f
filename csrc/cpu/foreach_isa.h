// Compiles the kernels of the file named by SK_KERNELS once per instruction set, each in a namespace of its own; SK_PICK
// then takes the one that this machine runs. (The way Google Highway compiles one source for several targets.)
// No include guard: each step's file includes this once.

#if defined(__x86_64__) && defined(__clang__)
#define SK_TARGET_AVX512 \
  _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c\"))), apply_to = function)")
#define SK_TARGET_AVX2 _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c\"))), apply_to = function)")
#define SK_TARGET_END _Pragma("clang attribute pop")
#elif defined(__x86_64__)
#define SK_TARGET_AVX512 _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c\")")
#define SK_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define SK_TARGET_END _Pragma("GCC pop_options")
#endif

#define SK_ISA

#define SK_VECTOR_BYTES 16
namespace sk::base {
#include "simd.h"
#include SK_KERNELS
}  // namespace sk::base
#undef SK_VECTOR_BYTES
#undef SK_INLINE

#if defined(__x86_64__)
SK_TARGET_AVX2
#define SK_VECTOR_BYTES 32
namespace sk::avx2 {
#include "simd.h"
#include SK_KERNELS
}  // namespace sk::avx2
#undef SK_VECTOR_BYTES
#undef SK_INLINE
SK_TARGET_END

SK_TARGET_AVX512
#define SK_VECTOR_BYTES 64
namespace sk::avx512 {
#include "simd.h"
#include SK_KERNELS
}  // namespace sk::avx512
#undef SK_VECTOR_BYTES
#undef SK_INLINE
SK_TARGET_END

// Called in namespace sk. The kernel may be a template: SK_PICK(rows<float, true>).
#define SK_PICK(...)                                                 \
  (instruction_set() == InstructionSet::avx512 ? avx512::__VA_ARGS__ \
   : instruction_set() == InstructionSet::avx2 ? avx2::__VA_ARGS__   \
                                               : base::__VA_ARGS__)
#else
#define SK_PICK(...) (base::__VA_ARGS__)
#endif

#undef SK_ISA
