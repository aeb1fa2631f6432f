// select: the weighted sum of the activated branches, v = sum_m a_m act(z_m), and its backward, the pass that writes.
//
// Bytes moved, at the least: M branches read and v written; backward, the gradient and M branches read and M written.

#include "common.cuh"

namespace sk::cuda {

// Those of a thread's channels, from element i on.
template <class A, int kWidth> __device__ __forceinline__ Constant<A, kWidth> constants(const void* array, int64_t i) {
  return Constant<A, kWidth>::in_memory(static_cast<const A*>(array) + i);
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
  // In channels_last every value of a vector has its own four constants, which are read once for so many pixels: for fewer, they would
  // be most of what passes through the first-level cache.
  template <int V> static constexpr int kMost = 4;
  const Select& f;
  int64_t b, c;

  template <int V, int kCount> __device__ __forceinline__ void run(int64_t offset, int64_t step) const {
    A total[kCount][V] = {};
    for (int m = 0; m < f.ys.M; ++m) {
      const int64_t i = m * f.ys.C + c;
      Packed<V, T> y[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) y[j].load(static_cast<const T*>(f.ys.y[m]) + offset + j * step);
      const auto mean = constants<A, kWidth>(f.mean, i), scale = constants<A, kWidth>(f.scale, i), bias = constants<A, kWidth>(f.bias, i),
                 a = constants<A, kWidth>(f.a, b * f.ys.M * f.ys.C + i);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        A z[V], u[V], k[V] = {};
#pragma unroll
        for (int e = 0; e < V; ++e) z[e] = (y[j][e] - mean[e]) * scale[e] + bias[e];
        activate(f.act.kind, static_cast<A>(f.act.negative_slope), z, u, k);
#pragma unroll
        for (int e = 0; e < V; ++e) total[j][e] += a[e] * u[e];
      }
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) store(static_cast<T*>(f.v) + offset + j * step, total[j]);
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
  // Of more, in half precision, registers would spill.
  template <int V> static constexpr int kMost = kAtOnce<V>;
  const SelectBackward& f;
  int64_t b, c;

  template <int V, int kCount> __device__ __forceinline__ void run(int64_t offset, int64_t step) const {
    Packed<V, T> g[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) g[j].load(static_cast<const T*>(f.g) + offset + j * step);
    const auto t = constants<A, kWidth>(f.t, b * f.ys.C + c);
    for (int m = 0; m < f.ys.M; ++m) {
      const int64_t i = m * f.ys.C + c;
      Packed<V, T> y[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) y[j].load(static_cast<const T*>(f.ys.y[m]) + offset + j * step);
      const auto mean = constants<A, kWidth>(f.mean, i), scale = constants<A, kWidth>(f.scale, i);
      A dz[kCount][V];
      {
        const auto bias = constants<A, kWidth>(f.bias, i), a = constants<A, kWidth>(f.a, b * f.ys.M * f.ys.C + i);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          A z[V], u[V];
#pragma unroll
          for (int e = 0; e < V; ++e) {
            z[e] = (y[j][e] - mean[e]) * scale[e] + bias[e];
            dz[j][e] = a[e] * g[j][e] + t[e];
          }
          activate(f.act.kind, static_cast<A>(f.act.negative_slope), z, u, dz[j]);
        }
      }
      // Read when the others are done with: there are no registers for all of them.
      const auto p = constants<A, kWidth>(f.p, i), q = constants<A, kWidth>(f.q, i);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        A dy[V];
#pragma unroll
        for (int e = 0; e < V; ++e) dy[e] = scale[e] * dz[j][e] - p[e] - (y[j][e] - mean[e]) * q[e];
        store(static_cast<T*>(f.dy[m]) + offset + j * step, dy);
      }
    }
  }
};

template <class T, bool kChannelsLast, int V, template <class, int> class Tile, class Parameters>
__device__ __forceinline__ void every_tile(const Parameters& f) {
  for (int64_t item = blockIdx.x; item < f.s.items(); item += gridDim.x) {
    const Place<kChannelsLast, V> place(f.s, f.ys, item);
    if (!place.inside) continue;
    for (int64_t b = place.b; b < place.b + place.images; ++b) {
      const Tile<T, kChannelsLast ? V : 1> tile{f, b, place.c};
      place.template walk<decltype(tile)::template kMost<V>>(f.s, f.ys, b, f.vectors ? static_cast<const T*>(f.ys.y[0]) : nullptr, tile);
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
    f.s = geometry(ys, V);
    launch<_select_kernel<T, kChannelsLast, V>>("select", ys, f.s.items(), {}, 0, queue, f);
  });
}

void select_backward(const void* g, const Branches& ys, const void* mean, const void* scale, const void* bias, const void* a, const void* t,
                     const void* p, const void* q, Act act, void* const* dys, Queue queue) {
  SelectBackward f{ys, {}, alike(g, ys.y, ys.M) && alike(g, dys, ys.M), act, g, mean, scale, bias, a, t, p, q, {}};
  std::copy_n(dys, ys.M, f.dy);
  dispatch(ys, f.vectors && all_aligned(g, mean, scale, bias, a, t, p, q), [&]<class T, bool kChannelsLast, int V>() {
    f.s = geometry(ys, V);
    launch<_select_backward_kernel<T, kChannelsLast, V>>("select_backward", ys, f.s.items(), {}, 0, queue, f);
  });
}

}  // namespace sk::cuda
