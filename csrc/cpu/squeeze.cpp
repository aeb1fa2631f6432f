// squeeze: the sums over the pixels that the pooled descriptor and, weighted by a gradient, the whole backward rest on.

#ifdef SK_ISA

// sum w u, sum w k and sum w k (y - mean) with u = act(z), k = act'(z).
template <class T, Activation kAct> struct PooledSums {
  using A = Accumulate<T>;
  Vec<A> u = {}, k = {}, ky = {};

  SK_INLINE void add(Vec<A> y, Vec<A> w, Vec<A> mean, Vec<A> scale, Vec<A> bias, Act<A, kAct> act) {
    const Vec<A> d = y - mean, z = d * scale + bias, wk = act.gate(z, w);
    u += w * act(z);
    k += wk;
    ky += wk * d;
  }
};

// kU neighbouring vectors, `count` of them `step` apart, each with its own sums.
template <class T, Activation kAct, bool kWeighted, bool kChannelsLast, int kU, bool kPartial>
SK_INLINE void pool(const Branches<T>& v, int64_t m, int64_t c, const T* y, const T* g, int64_t count, int64_t step, int64_t n,
                    PooledSums<T, kAct> (&sums)[kU]) {
  using A = Accumulate<T>;
  const Act<A, kAct> act{v.slope};
  Vec<A> mean[kU], scale[kU], bias[kU];
  for (int j = 0; j < kU; ++j) {
    const int64_t at = m * v.C + c + (kChannelsLast ? j * kLanes<A> : 0);
    mean[j] = constant<kChannelsLast, kPartial>(v.mean + at, n);
    scale[j] = constant<kChannelsLast, kPartial>(v.scale + at, n);
    bias[j] = constant<kChannelsLast, kPartial>(v.bias + at, n);
  }
  const Vec<A> one = kPartial ? mask<A>(n) : splat<A>(1);
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < kU; ++j) {
      const int64_t at = i * step + j * kLanes<A>;
      sums[j].add(load_lanes<kPartial>(y + at, n), kWeighted ? load_lanes<kPartial>(g + at, n) : one, mean[j], scale[j], bias[j], act);
    }
}

template <class T, Activation kAct, bool kWeighted, int kU, bool kPartial>
SK_INLINE void pool_channels(const Branches<T>& v, int64_t m, int64_t c, const T* y, const T* g, int64_t pixels, int64_t n,
                             Accumulate<T>* out) {
  using A = Accumulate<T>;
  PooledSums<T, kAct> sums[kU];
  pool<T, kAct, kWeighted, true, kU, kPartial>(v, m, c, y + c, g + c, pixels, v.C, n, sums);
  for (int j = 0; j < kU; ++j) {
    A* const at = out + c + j * kLanes<A>;
    store_lanes<kPartial>(at, sums[j].u, n);
    store_lanes<kPartial>(at + v.M * v.C, sums[j].k, n);
    store_lanes<kPartial>(at + 2 * v.M * v.C, sums[j].ky, n);
  }
}

template <class T, Activation kAct, bool kWeighted>
SK_INLINE void pool_row(const Branches<T>& v, int64_t m, int64_t c, const T* y, const T* g, int64_t pixels, Accumulate<T>* out) {
  using A = Accumulate<T>;
  PooledSums<T, kAct> pair[2], one[1];
  const int64_t pairs = pixels / (2 * kLanes<A>), n = pixels % kLanes<A>;
  const int64_t rest = pairs * 2 * kLanes<A>, vectors = (pixels - rest) / kLanes<A>, tail = rest + vectors * kLanes<A>;
  pool<T, kAct, kWeighted, false, 2, false>(v, m, c, y, g, pairs, 2 * kLanes<A>, 0, pair);
  pool<T, kAct, kWeighted, false, 1, false>(v, m, c, y + rest, g + rest, vectors, kLanes<A>, 0, one);
  if (n) pool<T, kAct, kWeighted, false, 1, true>(v, m, c, y + tail, g + tail, 1, 0, n, one);
  out[c] = sum<A>(pair[0].u + pair[1].u + one[0].u);
  out[v.M * v.C + c] = sum<A>(pair[0].k + pair[1].k + one[0].k);
  out[2 * v.M * v.C + c] = sum<A>(pair[0].ky + pair[1].ky + one[0].ky);
}

// out: (B, S, 3, M, C). A task is a segment where lanes are channels, one channel of a segment where they are pixels.
template <class T, Activation kAct, bool kWeighted>
void squeeze_tasks(const Branches<T>& v, const T* g, const Segments& segments, Accumulate<T>* out, int64_t first, int64_t last) {
  using A = Accumulate<T>;
  const int64_t channels = v.channels_last ? 1 : v.C;
  for (int64_t task = first; task < last; ++task) {
    const int64_t segment = task / channels, b = segment / segments.per_image;
    const int64_t start = segment % segments.per_image * segments.pixels;
    const int64_t pixels = v.HW - start < segments.pixels ? v.HW - start : segments.pixels;
    for (int64_t m = 0; m < v.M; ++m) {
      A* const sums = out + (segment * 3 * v.M + m) * v.C;
      if (!v.channels_last) {
        const int64_t c = task % channels, at = (b * v.C + c) * v.HW + start;
        pool_row<T, kAct, kWeighted>(v, m, c, v.y[m] + at, kWeighted ? g + at : nullptr, pixels, sums);
        continue;
      }
      const int64_t at = (b * v.HW + start) * v.C;
      const T* const y = v.y[m] + at;
      const T* const weight = kWeighted ? g + at : nullptr;
      int64_t c = 0;
      for (; c + 2 * kLanes<A> <= v.C; c += 2 * kLanes<A>) pool_channels<T, kAct, kWeighted, 2, false>(v, m, c, y, weight, pixels, 0, sums);
      for (; c + kLanes<A> <= v.C; c += kLanes<A>) pool_channels<T, kAct, kWeighted, 1, false>(v, m, c, y, weight, pixels, 0, sums);
      if (c < v.C) pool_channels<T, kAct, kWeighted, 1, true>(v, m, c, y, weight, pixels, v.C - c, sums);
    }
  }
}

#else

#include "common.h"
#include "operators.h"

#define SK_KERNELS "squeeze.cpp"
#include "foreach_isa.h"

namespace sk {

Tensor squeeze_cpu(TensorList ys, const Tensor& mean, const Tensor& scale, const Tensor& bias, c10::string_view activation,
                   double negative_slope, const std::optional<Tensor>& g) {
  check_normalized(ys, mean, scale, bias);
  if (g) check_like(*g, "g", ys[0]);
  const int64_t M = ys.size(), B = ys[0].size(0), C = ys[0].size(1);
  Tensor sums = at::empty({3, B, M, C}, mean.options());
  dispatch(ys[0].scalar_type(), activation, [&]<class T, Activation kAct>() {
    using A = Accumulate<T>;
    const Branches<T> v(ys, mean, scale, bias, negative_slope);
    const Segments segments(C, v.HW, v.channels_last);
    Tensor parts = at::empty({B * segments.per_image, 3, M * C}, mean.options());
    A* const part = parts.data_ptr<A>();
    const T* const weight = g ? g->const_data_ptr<T>() : nullptr;
    const auto kernel = g ? SK_PICK(squeeze_tasks<T, kAct, true>) : SK_PICK(squeeze_tasks<T, kAct, false>);
    const int64_t channels = v.channels_last ? 1 : C;
    at::parallel_for(0, B * segments.per_image * channels, grain(M * std::min(v.HW, segments.pixels) * C / channels),
                     [&](int64_t first, int64_t last) { kernel(v, weight, segments, part, first, last); });
    A* const out = sums.data_ptr<A>();
    for (int64_t b = 0; b < B; ++b)
      for (int64_t i = 0; i < 3; ++i)
        for (int64_t s = 0; s < segments.per_image || s == 0; ++s) {
          A* const to = out + (i * B + b) * M * C;
          const A* const from = part + ((b * segments.per_image + s) * 3 + i) * M * C;
          for (int64_t c = 0; c < M * C; ++c) to[c] = (s ? to[c] : A(0)) + (segments.per_image ? from[c] : A(0));
        }
  });
  return sums;
}

}  // namespace sk

#endif
