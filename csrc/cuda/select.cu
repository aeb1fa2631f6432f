// select: the weighted sum of the activated branches, v = sum_m a_m act(z_m), and its backward, the pass that writes.
//
// Bytes moved, at the least: M branches read and v written; backward, the gradient and M branches read and M written.

#include "common.cuh"

namespace sk::cuda {

// Of a vector, so many values are computed at a time: there are no registers for the constants of more. In channels_last they are read
// once for all vectors of a batch: else they would be most of what passes through the first-level cache.
template <int V> constexpr int kPiece = V == 8 ? 4 : V;

// Those of a thread's channels, from element i on: of V channels, or of one.
template <class A, int kWidth, int V> __device__ __forceinline__ auto constants(const void* array, int64_t i) {
  return Constant<A, kWidth == 1 ? 1 : V>::in_memory(static_cast<const A*>(array) + i);
}

struct Select {
  Branches ys;
  Geometry s;
  bool vectors;
  Act act;
  const void *mean, *scale, *bias, *a;
  void* v;
};

template <class T, int kWidth> struct Selected {
  using A = Accumulate<T>;
  const Select& f;
  int64_t b, c;
  static constexpr int kBatch = 4, kTogether = 1;
  A total[kBatch][kVector<T>];

  __device__ __forceinline__ void begin(int64_t) {}
  __device__ __forceinline__ int tensors() const { return f.ys.M; }
  __device__ __forceinline__ const T* tensor(int m) const { return static_cast<const T*>(f.ys.y[m]); }

  template <int V, int kCount>
  __device__ __forceinline__ void use(int m, const Packed<V, T> (&y)[kCount], int64_t offset, int step, int count) {
    constexpr int P = kPiece<V>;
#pragma unroll
    for (int piece = 0; piece < V; piece += P) {
      const int64_t channel = c + (kWidth == 1 ? 0 : piece), i = m * f.ys.C + channel;
      const auto mean = constants<A, kWidth, P>(f.mean, i), scale = constants<A, kWidth, P>(f.scale, i),
                 bias = constants<A, kWidth, P>(f.bias, i), a = constants<A, kWidth, P>(f.a, b * f.ys.M * f.ys.C + i);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        A z[P], u[P], k[P] = {};
#pragma unroll
        for (int e = 0; e < P; ++e) z[e] = (y[j][piece + e] - mean[e]) * scale[e] + bias[e];
        activate(f.act.kind, static_cast<A>(f.act.negative_slope), z, u, k);
#pragma unroll
        for (int e = 0; e < P; ++e) total[j][piece + e] = (m == 0 ? A(0) : total[j][piece + e]) + a[e] * u[e];
      }
    }
    if (m < f.ys.M - 1) return;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      A v[V];
#pragma unroll
      for (int e = 0; e < V; ++e) v[e] = total[j][e];
      if (j < count) store(static_cast<T*>(f.v) + offset + int64_t{j} * step, v);
    }
  }
};

struct SelectBackward {
  Branches ys;
  Geometry s;
  bool vectors;
  Act act;
  const void *g, *mean, *scale, *bias, *a, *t, *p, *q;
  void* dy[kMostBranches];
};

// dy = scale act'(z) (a g + t) - p - (y - mean) q: the gradient through the sum and the squeeze (t), then through the batch-norm
// (p and q carry its two sums; both 0 if it used running statistics).
template <class T, int kWidth> struct BackwardOfSelected {
  using A = Accumulate<T>;
  const SelectBackward& f;
  int64_t b, c;
  static constexpr int kBatch = 4, kTogether = 1;
  Packed<kVector<T>, T> g[kBatch];

  __device__ __forceinline__ void begin(int64_t) {}
  __device__ __forceinline__ int tensors() const { return 1 + f.ys.M; }
  __device__ __forceinline__ const T* tensor(int t) const { return static_cast<const T*>(t == 0 ? f.g : f.ys.y[t - 1]); }

  template <int V, int kCount>
  __device__ __forceinline__ void use(int tensor, const Packed<V, T> (&y)[kCount], int64_t offset, int step, int count) {
    constexpr int P = kPiece<V>;
    if (tensor == 0) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) memcpy(&g[j], &y[j], sizeof(y[j]));
      return;
    }
    const int m = tensor - 1;
    Packed<V, T> dy[kCount];
#pragma unroll
    for (int piece = 0; piece < V; piece += P) {
      const int64_t channel = c + (kWidth == 1 ? 0 : piece), i = m * f.ys.C + channel;
      const auto mean = constants<A, kWidth, P>(f.mean, i), scale = constants<A, kWidth, P>(f.scale, i),
                 bias = constants<A, kWidth, P>(f.bias, i), a = constants<A, kWidth, P>(f.a, b * f.ys.M * f.ys.C + i),
                 t = constants<A, kWidth, P>(f.t, b * f.ys.C + channel), p = constants<A, kWidth, P>(f.p, i),
                 q = constants<A, kWidth, P>(f.q, i);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        A d[P], z[P], u[P], dz[P];
#pragma unroll
        for (int e = 0; e < P; ++e) {
          d[e] = y[j][piece + e] - mean[e];
          z[e] = d[e] * scale[e] + bias[e];
          dz[e] = a[e] * g[j][piece + e] + t[e];
        }
        activate(f.act.kind, static_cast<A>(f.act.negative_slope), z, u, dz);
#pragma unroll
        for (int e = 0; e < P; ++e) dz[e] = scale[e] * dz[e] - p[e] - d[e] * q[e];
        dy[j].set(piece, dz);
      }
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      if (j < count) dy[j].store(static_cast<T*>(f.dy[m]) + offset + int64_t{j} * step);
  }
};

template <class T, bool kChannelsLast, int V, template <class, int> class Tile, class Parameters>
__device__ __forceinline__ void every_tile(const Parameters& f) {
  for (uint32_t item = blockIdx.x; item < f.s.items(); item += gridDim.x) {
    const Place<kChannelsLast, V> place(f.s, f.ys, item);
    if (!place.inside) continue;
    for (int64_t b = place.b; b < place.b + place.images; ++b) {
      Tile<T, kChannelsLast ? V : 1> tile{f, b, place.c, {}};
      place.walk(f.s, f.ys, b, f.vectors ? static_cast<const T*>(f.ys.y[0]) : nullptr, tile);
    }
  }
}

template <class T, bool kChannelsLast, int V>
__global__ __launch_bounds__(kThreads, 2) void _select_kernel(const __grid_constant__ Select f) {
  every_tile<T, kChannelsLast, V, Selected>(f);
}

template <class T, bool kChannelsLast, int V>
__global__ __launch_bounds__(kThreads, 2) void _select_backward_kernel(const __grid_constant__ SelectBackward f) {
  every_tile<T, kChannelsLast, V, BackwardOfSelected>(f);
}

void select(const Branches& ys, const void* mean, const void* scale, const void* bias, const void* a, Act act, void* v, Queue queue) {
  Select f{ys, {}, alike(v, ys.y, ys.M), act, mean, scale, bias, a, v};
  dispatch(ys, f.vectors && all_aligned(v, mean, scale, bias, a), [&]<class T, bool kChannelsLast, int V>() {
    f.s = geometry(ys, V, kBlock);
    launch<_select_kernel<T, kChannelsLast, V>>("select", ys, f.s.items(), Blocks::alone, streamed<kChannelsLast, V>, queue, f);
  });
}

void select_backward(const void* g, const Branches& ys, const void* mean, const void* scale, const void* bias, const void* a, const void* t,
                     const void* p, const void* q, Act act, void* const* dys, Queue queue) {
  SelectBackward f{ys, {}, alike(g, ys.y, ys.M) && alike(g, dys, ys.M), act, g, mean, scale, bias, a, t, p, q, {}};
  std::copy_n(dys, ys.M, f.dy);
  dispatch(ys, f.vectors && all_aligned(g, mean, scale, bias, a, t, p, q), [&]<class T, bool kChannelsLast, int V>() {
    f.s = geometry(ys, V, kBlock);
    launch<_select_backward_kernel<T, kChannelsLast, V>>("select_backward", ys, f.s.items(), Blocks::alone, streamed<kChannelsLast, V>,
                                                         queue, f);
  });
}

}  // namespace sk::cuda
