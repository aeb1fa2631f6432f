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

// Images whose attention is computed at a time, at most; the weights are read once for them.
constexpr int kAttended = 4;

// The threads of a block as a team: how many there are, and which of them this is.
struct WholeBlock {
  static constexpr int kCount = kThreads;
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
};

// A row of a tile: its pixel in v, or -1 if there is none, and its image.
struct Row {
  int pixel, image;
};

// Vectors of 8 channels that a thread selects at a time, of so many branches, and about how many values a part of the selection has.
constexpr int kSelected = 3, kSelectedBranches = 2, kPartValues = 16384;

// v = sum_m a_m u_m for rows [first, end) of a tile, which row_of(p) describes. u: its M branches, `branch` values each; `lanes` threads
// share a row.
template <class T, class Team, class RowOf>
__device__ __forceinline__ void select_rows(const Unit& f, const T* u, int branch, const float* a, int first, int end, const Divisor& lanes,
                                            const RowOf& row_of) {
  constexpr int V = 8;
  const int C = f.C, rows = Team::kCount / lanes, own = Team::thread() / lanes;
  if (own >= rows) return;
  for (int c = (Team::thread() - own * lanes) * V; c < C; c += lanes * V)
    for (int p = first + own; p < end; p += rows * kSelected) {
      float total[kSelected][V] = {};
      Row row[kSelected];
#pragma unroll
      for (int j = 0; j < kSelected; ++j) row[j] = p + j * rows < end ? row_of(p + j * rows) : Row{-1, 0};
#pragma unroll 1
      for (int m = 0; m < f.M; m += kSelectedBranches) {
        uint4 packed[kSelectedBranches][kSelected] = {};
#pragma unroll
        for (int b = 0; b < kSelectedBranches; ++b)
#pragma unroll
          for (int j = 0; j < kSelected; ++j)
            if (m + b < f.M && row[j].pixel >= 0)
              packed[b][j] = load_fresh(reinterpret_cast<const uint4*>(u + ((m + b) * branch + (p + j * rows) * C + c)));
#pragma unroll
        for (int b = 0; b < kSelectedBranches; ++b) {
          if (m + b >= f.M) break;
          float weights[V];
#pragma unroll
          for (int j = 0; j < kSelected; ++j) {
            if (row[j].pixel < 0) continue;
            if (j == 0 || row[j - 1].pixel < 0 || row[j].image != row[j - 1].image) {
              const float4* const from = reinterpret_cast<const float4*>(a + (int64_t{row[j].image} * f.M + m + b) * C + c);
              const float4 halves[2] = {load_fresh(from), load_fresh(from + 1)};
              memcpy(weights, halves, sizeof(weights));
            }
            T values[V];
            memcpy(values, &packed[b][j], sizeof(values));
#pragma unroll
            for (int i = 0; i < V; ++i) total[j][i] += weights[i] * widen(values[i]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kSelected; ++j)
        if (row[j].pixel >= 0) store(static_cast<T*>(f.v) + int64_t{row[j].pixel} * C + c, total[j]);
    }
}

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
