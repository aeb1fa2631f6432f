// Compiles the text of csrc/cuda/*.cu for the host: every CUDA thread is a fiber, blocks and threads take turns in an order that a
// seed decides. What a kernel may not rely on is shaken: which thread is first, which blocks are resident. Shared memory is as large
// as the launch says, and NaN before it is written.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace cuda_on_host {

struct Index {
  unsigned x;
};

// Of the fiber that runs, as the next ones.
void* shared_bytes();
void wait_for_block();
void wait_for_warp(unsigned mask);
void wait_for_all_blocks();
// `count` threads of the block.
void wait_for_meeting(int meeting, unsigned count);
void yield();
[[noreturn]] void fail(const char* what);
// What lane `from` of the warp gives; all lanes of the mask call it.
void exchange(unsigned mask, const void* mine, void* theirs, size_t size, int from);

// What all lanes of the warp give, 16 bytes apart; good until this lane asks again.
const unsigned char* gather(const void* mine, size_t size);
// Copies that this thread has begun: group by group, the one that is open last.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
std::deque<std::vector<Copy>>& copies();
// Until it is said that what is there has changed.
void wait_for_change(const void* what);
void changed(const void* what);
// Before and after a count that blocks share is read, or added to.
void others_go_first(bool adds);

// Runs `thread` for every thread of every block.
void run(unsigned blocks, unsigned threads, size_t shared, bool cooperative, const std::function<void()>& thread);

}  // namespace cuda_on_host

extern cuda_on_host::Index threadIdx, blockIdx, gridDim;

inline void __syncthreads() { cuda_on_host::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xffffffff) { cuda_on_host::wait_for_warp(mask); }

template <class T> T __shfl_xor_sync(unsigned mask, T x, int other, int = 32) {
  T out;
  cuda_on_host::exchange(mask, &x, &out, sizeof(T), static_cast<int>(threadIdx.x % 32) ^ other);
  return out;
}

template <class T> T __shfl_down_sync(unsigned mask, T x, int distance, int width = 32) {
  const int lane = threadIdx.x % 32;
  T out;
  cuda_on_host::exchange(mask, &x, &out, sizeof(T), lane % width + distance < width ? lane + distance : lane);
  return out;
}

inline float __fdividef(float x, float y) { return x / y; }

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// To the nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float magnitude = exponent == 31  ? (fraction == 0 ? INFINITY : NAN)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  // Halfway to what would be the next value.
  if (magnitude >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 0x1p-14f) return {static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(magnitude * 0x1p24f)))};
  const int exponent = std::ilogb(magnitude);
  // A fraction that is rounded up to 1 goes on into the exponent.
  return {static_cast<uint16_t>(sign |
                                (((exponent + 15) << 10) + static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent))) - 1024))};
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
using cudaStream_t = struct CUstream_st*;
struct dim3 {
  unsigned x;
  dim3(unsigned x = 1) : x(x) {}
};
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrL2CacheSize,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

// How much shared memory a kernel may have.
template <class Kernel> inline std::map<Kernel, size_t> allowed_shared;
template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (bytes > most) return cudaErrorInvalidConfiguration;
  allowed_shared<Kernel>[kernel] = bytes;
  return cudaSuccess;
}

template <class Kernel> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const A&... arguments) {
  // As a device refuses them.
  if (config->dynamicSmemBytes > std::max<size_t>(48 * 1024, allowed_shared<void (*)(P...)>[kernel]) || config->blockDim.x > 1024)
    return cudaErrorInvalidConfiguration;
  cuda_on_host::run(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, config->numAttrs > 0, [&] { kernel(arguments...); });
  return cudaSuccess;
}

namespace sk::cuda {
template <class A> A* shared_memory() { return static_cast<A*>(cuda_on_host::shared_bytes()); }
inline void store_vector(void* p, const uint4& x) { *static_cast<uint4*>(p) = x; }
inline void wait_for_grid() { cuda_on_host::wait_for_all_blocks(); }

// As intrinsics.cuh has them.
inline void load_matrices(uint32_t (&r)[4], const unsigned char* base, int place) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned char* const row = base + place;
  const unsigned char* const rows = cuda_on_host::gather(&row, sizeof(row));
  for (unsigned j = 0; j < 4; ++j) {
    const unsigned char* from;
    memcpy(&from, rows + (8 * j + lane / 4) * 16, sizeof(from));
    memcpy(&r[j], from + lane % 4 * 4, 4);
  }
}

inline float as_float(__half x) { return __half2float(x); }
inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> void multiply_add(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  T rows[4][4][2], columns[4][2][2];
  memcpy(rows, cuda_on_host::gather(a, 16) + g * 64, 64);
  const uint32_t mine[2] = {b0, b1};
  const unsigned char* const right = cuda_on_host::gather(mine, 8);
  for (unsigned e = 0; e < 2; ++e) {
    for (unsigned lane = 0; lane < 4; ++lane) memcpy(columns[lane], right + ((2 * t + e) * 4 + lane) * 16, 8);
    for (unsigned h = 0; h < 2; ++h) {
      double total = 0;
      for (unsigned lane = 0; lane < 4; ++lane)
        for (unsigned half = 0; half < 2; ++half)
          for (unsigned i = 0; i < 2; ++i) total += double{as_float(rows[lane][2 * half + h][i])} * as_float(columns[lane][half][i]);
      c[2 * h + e] += static_cast<float>(total);
    }
  }
}

constexpr bool kHopper = true;

inline int same_in_warp(int x) {
  int first;
  cuda_on_host::exchange(0xffffffff, &x, &first, sizeof(x), 0);
  return first;
}

struct SharedMatrix {
  const unsigned char* at;
  int apart;
  SharedMatrix(const unsigned char* shared, int at, int apart) : at(shared + at), apart(apart) {}
  SharedMatrix from(int row) const {
    SharedMatrix later = *this;
    later.at += 16 * row;
    return later;
  }
  template <class T> float operator()(int row, int k) const {
    T value;
    memcpy(&value, at + k / 8 * apart + row * 16 + k % 8 * 2, sizeof(value));
    return as_float(value);
  }
};

// Of the four warps each does its own 16 rows, when it is asked to.
template <class T, int kAlong> void multiply_add_shared(T, float (&c)[kAlong][4], const SharedMatrix& left, const SharedMatrix& right, bool adds) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp = threadIdx.x / 32 % 4;
  for (int h = 0; h < 2; ++h) {
    float row[16];
    for (int k = 0; k < 16; ++k) row[k] = left.template operator()<T>(16 * warp + g + 8 * h, k);
    for (int j = 0; j < kAlong; ++j)
      for (int e = 0; e < 2; ++e) {
        double total = 0;
        for (int k = 0; k < 16; ++k) total += double{row[k]} * right.template operator()<T>(8 * j + 2 * t + e, k);
        c[j][2 * h + e] = (adds ? c[j][2 * h + e] : 0) + static_cast<float>(total);
      }
  }
}

// A barrier in shared memory.
struct SharedBarrier {
  int16_t expected, missing;
  int32_t parity : 1, bytes : 31;

  static SharedBarrier& of(unsigned char* shared, int at) { return *reinterpret_cast<SharedBarrier*>(shared + at); }
  void arrive(int arrivals, int more_bytes) {
    cuda_on_host::yield();
    missing -= arrivals;
    bytes += more_bytes;
    if (missing < 0) cuda_on_host::fail("more arrive than a barrier is open for");
    if (missing > 0 || bytes != 0) return;
    missing = expected;
    parity = ~parity;
    cuda_on_host::changed(this);
  }
};
static_assert(sizeof(SharedBarrier) == 8);
inline void open_barrier(unsigned char* shared, int at, int arrivals) {
  SharedBarrier::of(shared, at) = {static_cast<int16_t>(arrivals), static_cast<int16_t>(arrivals), 0, 0};
}
inline void barriers_are_open() {}
inline void arrive_at(unsigned char* shared, int at) { SharedBarrier::of(shared, at).arrive(1, 0); }
inline void arrive_expecting(unsigned char* shared, int at, int bytes) { SharedBarrier::of(shared, at).arrive(1, bytes); }
inline void wait_at(unsigned char* shared, int at, int parity) {
  while ((SharedBarrier::of(shared, at).parity & 1) == parity) cuda_on_host::wait_for_change(shared + at);
}
inline void copies_after_stores() {}
inline void copy_bulk(unsigned char* shared, int to, const void* from, int bytes, int at) {
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0) cuda_on_host::fail("a copy is not aligned");
  memcpy(shared + to, from, bytes);
  SharedBarrier::of(shared, at).arrive(0, -bytes);
}
template <int kCount> void meet_others(int meeting) { cuda_on_host::wait_for_meeting(meeting, kCount); }
template <int kHad, int kWanted> void take_registers() {}
inline void before_products() {}
inline void copies_before_products() {}
inline void close_products() {}
// The lanes multiply one after the other; all of them have done so.
template <int kLeft> void wait_for_products() { __syncwarp(); }
inline unsigned char* shared_matrices() { return shared_memory<unsigned char>(); }

// What is copied is there once it has been waited for, and not before.
template <int kBytes> void copy_async(unsigned char* base, int to, const void* from, bool there) {
  cuda_on_host::copies().back().push_back({base + to, there ? from : nullptr, kBytes});
}
inline void close_copies() { cuda_on_host::copies().emplace_back(); }
template <int kLeft> void wait_for_copies() {
  auto& groups = cuda_on_host::copies();
  // The last one is open.
  for (; groups.size() > kLeft + 1; groups.pop_front())
    for (const auto& [to, from, bytes] : groups.front()) {
      if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0)
        cuda_on_host::fail("a copy is not aligned");
      if (from != nullptr) memcpy(to, from, bytes);
      else memset(to, 0, bytes);
    }
}

inline void arrive_after_copies(unsigned char* shared, int at) {
  close_copies();
  wait_for_copies<0>();
  arrive_at(shared, at);
}

template <class V> V load_fresh(const V* p) { return *p; }

inline unsigned read_count(const unsigned* p) {
  cuda_on_host::others_go_first(false);
  return *p;
}
inline unsigned add_to_count(unsigned* p) {
  cuda_on_host::others_go_first(true);
  return (*p)++;
}
inline unsigned take_number(unsigned* p) { return add_to_count(p); }
inline void wait_a_little() {}
}  // namespace sk::cuda
