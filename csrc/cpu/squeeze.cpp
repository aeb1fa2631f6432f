// squeeze: the sums over the pixels that the pooled descriptor rests on; and select_backward_sums, the same weighted by a
// gradient, on which the whole backward rests.

#ifdef SK_ISA

// sum w u, sum w k and sum w k (y - mean) with u = act(z), k = act'(z); the first alone if kSums is 1.
template <class T, Activation kAct, int kSums> struct PooledSums {
  using A = Accumulate<T>;
  Vec<A> sums[kSums] = {};

  SK_INLINE void add(Vec<A> y, Vec<A> w, Vec<A> mean, Vec<A> scale, Vec<A> bias, Act<A, kAct> act) {
    const Vec<A> d = y - mean, z = d * scale + bias;
    sums[0] += w * act(z);
    if constexpr (kSums == 3) {
      const Vec<A> wk = act.gate(z, w);
      sums[1] += wk;
      sums[2] += wk * d;
    }
  }
};

// Adds kN vectors, `step` apart, of branch m to `sums`, vector j to sums[j % kU].
template <class T, Activation kAct, int kSums, bool kWeighted, bool kChannelsLast, int kN, bool kPartial, int kU>
SK_INLINE void pool(const Branches<T>& v, int64_t at, const T* y, const T* g, int64_t step, int64_t n,
                    PooledSums<T, kAct, kSums> (&sums)[kU]) {
  using A = Accumulate<T>;
  const Act<A, kAct> act{v.slope};
  const Vec<A> mean = constant<kChannelsLast, kPartial>(v.mean + at, n);
  const Vec<A> scale = constant<kChannelsLast, kPartial>(v.scale + at, n);
  const Vec<A> bias = constant<kChannelsLast, kPartial>(v.bias + at, n);
  const Vec<A> one = kPartial ? mask<A>(n) : splat<A>(1);
  for (int j = 0; j < kN; ++j)
    sums[j % kU].add(load_lanes<kPartial>(y + j * step, n), kWeighted ? load_lanes<kPartial>(g + j * step, n) : one, mean, scale, bias,
                     act);
}

// Lanes are channels: the sums of channel c stay in `out` (kSums, M, C), and kN pixels at a time are added to them.
template <class T, Activation kAct, int kSums, bool kWeighted, int kN>
SK_INLINE void pool_pixels(const Branches<T>& v, int64_t m, const T* y, const T* g, Accumulate<T>* out) {
  using A = Accumulate<T>;
  int64_t c = 0;
  for (; c + kLanes<A> <= v.C; c += kLanes<A>) {
    if constexpr (kN > 1) {
      prefetch_next_pixels<kN>(y + c, v.C, c);
      if constexpr (kWeighted) prefetch_next_pixels<kN>(g + c, v.C, c);
    }
    PooledSums<T, kAct, kSums> sums[1];
    pool<T, kAct, kSums, kWeighted, true, kN, false>(v, m * v.C + c, y + c, g + c, v.C, 0, sums);
    for (int i = 0; i < kSums; ++i) {
      A* const total = out + i * v.M * v.C + c;
      store(total, load(total) + sums[0].sums[i]);
    }
  }
  if (c < v.C) {
    const int64_t n = v.C - c;
    PooledSums<T, kAct, kSums> sums[1];
    pool<T, kAct, kSums, kWeighted, true, kN, true>(v, m * v.C + c, y + c, g + c, v.C, n, sums);
    for (int i = 0; i < kSums; ++i) {
      A* const total = out + i * v.M * v.C + c;
      store(total, load(total, n) + sums[0].sums[i], n);
    }
  }
}

// Lanes are pixels: out[i][m][c] for one channel. Summed in blocks, so that no long chain of additions rounds one way.
template <class T, Activation kAct, int kSums, bool kWeighted>
SK_INLINE void pool_row(const Branches<T>& v, int64_t at, const T* y, const T* g, int64_t pixels, Accumulate<T>* out) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  Vec<A> total[kSums] = {};
  for (int64_t i = 0; i < pixels;) {
    const int64_t end = pixels - i < 64 * L ? pixels : i + 64 * L;
    PooledSums<T, kAct, kSums> sums[2];
    for (; i + 4 * L <= end; i += 4 * L) {
      prefetch_ahead<4>(y + i);
      if constexpr (kWeighted) prefetch_ahead<4>(g + i);
      pool<T, kAct, kSums, kWeighted, false, 4, false>(v, at, y + i, g + i, L, 0, sums);
    }
    for (; i + L <= end; i += L) pool<T, kAct, kSums, kWeighted, false, 1, false>(v, at, y + i, g + i, L, 0, sums);
    if (i < end) pool<T, kAct, kSums, kWeighted, false, 1, true>(v, at, y + i, g + i, L, end - i, sums);
    i = end;
    for (int s = 0; s < kSums; ++s) total[s] += sums[0].sums[s] + sums[1].sums[s];
  }
  for (int s = 0; s < kSums; ++s) out[s * v.M * v.C] = sum<A>(total[s]);
}

// out: (B, S, kSums, M, C). A task is a segment where lanes are channels, one channel of a segment where they are pixels.
template <class T, Activation kAct, int kSums, bool kWeighted>
void squeeze_tasks(const Branches<T>& v, const T* g, const Segments& segments, Accumulate<T>* out, int64_t first, int64_t last) {
  using A = Accumulate<T>;
  const int64_t channels = v.channels_last ? 1 : v.C;
  for (int64_t task = first; task < last; ++task) {
    const int64_t segment = task / channels, b = segment / segments.per_image;
    const int64_t start = segment % segments.per_image * segments.pixels;
    const int64_t pixels = v.HW - start < segments.pixels ? v.HW - start : segments.pixels;
    for (int64_t m = 0; m < v.M; ++m) {
      A* const sums = out + (segment * kSums * v.M + m) * v.C;
      if (!v.channels_last) {
        const int64_t c = task % channels, at = (b * v.C + c) * v.HW + start;
        pool_row<T, kAct, kSums, kWeighted>(v, m * v.C + c, v.y[m] + at, kWeighted ? g + at : nullptr, pixels, sums + c);
        continue;
      }
      for (int i = 0; i < kSums; ++i)
        for (int64_t c = 0; c < v.C; ++c) sums[i * v.M * v.C + c] = 0;
      const T* y = v.y[m] + (b * v.HW + start) * v.C;
      const T* weight = kWeighted ? g + (b * v.HW + start) * v.C : nullptr;
      constexpr int64_t kN = kPixelsAtOnce;
      int64_t pixel = 0;
      for (; pixel + kN <= pixels; pixel += kN, y += kN * v.C, weight += kN * v.C)
        pool_pixels<T, kAct, kSums, kWeighted, kN>(v, m, y, weight, sums);
      for (; pixel < pixels; ++pixel, y += v.C, weight += v.C) pool_pixels<T, kAct, kSums, kWeighted, 1>(v, m, y, weight, sums);
    }
  }
}

#else

#include "common.h"
#include "operators.h"

#define SK_KERNELS "squeeze.cpp"
#include "foreach_isa.h"

namespace sk {

// The sums, each (B, M, C); weighted by g, if it is given.
static std::vector<Tensor> pooled_sums(TensorList ys, const Tensor& mean, const Tensor& scale, const Tensor& bias,
                                       c10::string_view activation, double negative_slope, int64_t sums, const Tensor* g) {
  const int64_t M = ys.size(), B = ys[0].size(0), C = ys[0].size(1);
  std::vector<Tensor> out;
  for (int64_t i = 0; i < sums; ++i) out.push_back(at::zeros({B, M, C}, mean.options()));
  dispatch(ys[0].scalar_type(), activation, [&]<class T, Activation kAct>() {
    using A = Accumulate<T>;
    const Branches<T> v(ys, mean, scale, bias, negative_slope);
    const Segments segments(C, v.HW, v.channels_last);
    Tensor parts = at::empty({B * segments.per_image, sums, M * C}, mean.options());
    A* const part = parts.data_ptr<A>();
    const T* const weight = g ? g->const_data_ptr<T>() : nullptr;
    const auto kernel = g           ? SK_PICK(squeeze_tasks<T, kAct, 3, true>)
                        : sums == 3 ? SK_PICK(squeeze_tasks<T, kAct, 3, false>)
                                    : SK_PICK(squeeze_tasks<T, kAct, 1, false>);
    const int64_t channels = v.channels_last ? 1 : C;
    at::parallel_for(0, B * segments.per_image * channels, grain(M * std::min(v.HW, segments.pixels) * C / channels),
                     [&](int64_t first, int64_t last) { kernel(v, weight, segments, part, first, last); });
    at::parallel_for(0, B, grain(segments.per_image * sums * M * C), [&](int64_t first, int64_t last) {
      for (int64_t segment = first * segments.per_image; segment < last * segments.per_image; ++segment)
        for (int64_t i = 0; i < sums; ++i) {
          A* const to = out[i].data_ptr<A>() + segment / segments.per_image * M * C;
          const A* const from = part + (segment * sums + i) * M * C;
          for (int64_t c = 0; c < M * C; ++c) to[c] += from[c];
        }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor> > squeeze_cpu(TensorList ys, const OptionalTensors& norm_weights,
                                                                                     const OptionalTensors& norm_biases, TensorList means,
                                                                                     TensorList variances, double eps,
                                                                                     c10::string_view activation, double negative_slope,
                                                                                     int64_t sums) {
  check_branches(ys);
  TORCH_CHECK_VALUE(sums == 1 || sums == 3, "sums: expected 1 or 3, got ", sums);
  const auto folded = fold(norm_weights, norm_biases, means, variances, eps, accumulate_type(ys[0].scalar_type()));
  const auto& [mean, r, scale, bias] = folded;
  check_normalized(ys, mean, scale, bias);
  auto out = pooled_sums(ys, mean, scale, bias, activation, negative_slope, sums, nullptr);
  const Tensor pooled = out[0];
  out.erase(out.begin());
  return {mean, r, scale, bias, pooled, out};
}

std::tuple<Tensor, Tensor, Tensor> select_backward_sums_cpu(const Tensor& g, TensorList ys, const Tensor& mean, const Tensor& scale,
                                                            const Tensor& bias, c10::string_view activation, double negative_slope) {
  check_normalized(ys, mean, scale, bias);
  check_like(g, "g", ys[0]);
  const auto out = pooled_sums(ys, mean, scale, bias, activation, negative_slope, 3, &g);
  return {out[0], out[1], out[2]};
}

}  // namespace sk

#endif
