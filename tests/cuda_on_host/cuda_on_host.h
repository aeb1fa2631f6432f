// Compiles the text of csrc/cuda/*.cu for the host: every CUDA thread is a fiber, blocks and threads take turns in an order that a
// seed decides. What a kernel may not rely on is shaken: which thread is first, which blocks are resident. Shared memory is as large
// as the launch says, and NaN before it is written.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

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
void yield();
// What lane `from` of the warp gives; all lanes of the mask call it.
void exchange(unsigned mask, const void* mine, void* theirs, size_t size, int from);

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
  const float magnitude = exponent == 31 ? (fraction == 0 ? INFINITY : NAN)
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
  return {static_cast<uint16_t>(sign | (((exponent + 15) << 10) + static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent))) - 1024))};
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
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
template <class Kernel> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

template <class... P, class... A> cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const A&... arguments) {
  // As a device refuses them.
  if (config->dynamicSmemBytes > 48 * 1024 || config->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  cuda_on_host::run(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, config->numAttrs > 0, [&] { kernel(arguments...); });
  return cudaSuccess;
}

namespace sk::cuda {
template <class A> A* shared_memory() { return static_cast<A*>(cuda_on_host::shared_bytes()); }
inline void wait_for_grid() { cuda_on_host::wait_for_all_blocks(); }
}  // namespace sk::cuda
