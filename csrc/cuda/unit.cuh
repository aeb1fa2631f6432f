// What the two kernels of the eval unit share: unit.cu for every device, unit_hopper.cu for compute capability 9.0. Both cut the output
// into tiles, keep u, the activated branches, in a ring of tiles that stays in the L2 cache, and count per tile what is done.
#pragma once

#include "attention.cuh"
#include "intrinsics.cuh"

#include <utility>

namespace sk::cuda {

constexpr int kTaps = 9;

// A number that others, from 0 to 2^31 - 1, are divided by: n / d = n * (2^shift / d, rounded up) / 2^shift, in three instructions.
struct Divisor {
  int value = 1;
  unsigned factor = 1u << 31;
  int shift = 31;

  Divisor() = default;
  explicit __host__ Divisor(int64_t d) : value(static_cast<int>(d)) {
    while (int64_t{1} << (shift - 31) < d) ++shift;
    factor = static_cast<unsigned>(((uint64_t{1} << shift) + d - 1) / d);
  }
  __host__ __device__ operator int() const { return value; }
  friend __host__ __device__ __forceinline__ int operator/(int n, const Divisor& d) {
    return static_cast<int>(static_cast<uint64_t>(static_cast<unsigned>(n)) * d.factor >> d.shift);
  }
  friend __host__ __device__ __forceinline__ int operator%(int n, const Divisor& d) { return n - n / d * d.value; }
};

// Of a product with kColumns columns: of kJoined of its matrix instructions, 8 columns each, a lane has kOwn channels that are side by
// side, since column n is this channel, and a lane has columns 2t and 2t + 1 of each instruction.
template <int kColumns> struct Columns {
  static constexpr int kAlong = kColumns / 8, kJoined = kAlong < 4 ? kAlong : 4, kOwn = 2 * kJoined;
  static_assert(kAlong % kJoined == 0);
  static __host__ __device__ constexpr int channel_of(int n) {
    return n / (8 * kJoined) * (8 * kJoined) + n / 2 % 4 * kOwn + n / 8 % kJoined * 2 + n % 2;
  }
};

// The sums over the eight lanes 4 apart of kValues each: of the k-th in those lanes that are k of kValues parts of the warp.
template <int kValues> __device__ __forceinline__ float scatter_sums(int lane, float (&x)[kValues]) {
  int n = kValues;
#pragma unroll
  for (int o = 16; o >= 4; o /= 2) {
    if (n == 1) {
      x[0] += __shfl_xor_sync(kAllLanes, x[0], o);
      continue;
    }
    n /= 2;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const bool upper = lane & o;
      const float given = __shfl_xor_sync(kAllLanes, upper ? x[k] : x[k + n], o);
      x[k] = (upper ? x[k + n] : x[k]) + given;
    }
  }
  return x[0];
}

// Images whose attention is computed at a time, at most; the weights are read once for them. About how many values a part of the selection
// has.
constexpr int kAttended = 4, kPartValues = 16384;

__device__ __forceinline__ void wait_for(const unsigned* count, int all) {
  while (read_count(count) < static_cast<unsigned>(all)) wait_a_little();
}

inline std::string shape_of(const Unit& f) {
  return "M = " + std::to_string(f.M) + ", B = " + std::to_string(f.B) + ", x of " + std::to_string(f.channels) + " channels, " +
         std::to_string(f.H) + " x " + std::to_string(f.W) + ", C = " + std::to_string(f.C) + ", groups = " + std::to_string(f.groups) +
         ", stride = " + std::to_string(f.stride);
}

template <class F> void with_type(Type type, const F& f) {
  if (type == Type::float16) f.template operator()<__half>();
  else f.template operator()<__nv_bfloat16>();
}

// Parts of the scratch memory, one after the other, each at a multiple of 16 bytes.
struct Parts {
  int64_t bytes = 0;
  int64_t take(int64_t more) { return std::exchange(bytes, bytes + quotient(more, 16) * 16); }
};

// unit() on compute capability 9.0; false, and nothing is done, where this kernel does not take the shape.
bool unit_on_hopper(const Unit& f, const std::function<void*(int64_t)>& allocate, Queue queue);

}  // namespace sk::cuda
