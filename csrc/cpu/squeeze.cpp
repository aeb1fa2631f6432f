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

// Lanes are channels: to `out` (kSums, M, C) are added the sums of branch m.
template <class T, Activation kAct, int kSums, bool kWeighted> struct PoolChannels {
  using A = Accumulate<T>;
  const Branches<T>& v;
  int64_t m;
  const T *y, *g;
  A* out;

  template <int kN, int kStrands, bool kPartial>
  SK_INLINE void add(int64_t c, int64_t offset, int64_t pixels, int64_t step, int64_t n) const {
    constexpr int64_t L = kLanes<A>;
    const int64_t at = m * v.C + c;
    const Act<A, kAct> act{v.slope};
    const Vec<A> one = kPartial ? mask<A>(n) : splat<A>(1);
    PooledSums<T, kAct, kSums> sums[kN];
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      for (int j = 0; j < kN; ++j) {
        const Vec<A> mean = load_lanes<kPartial>(v.mean + at + j * L, n), scale = load_lanes<kPartial>(v.scale + at + j * L, n),
                     bias = load_lanes<kPartial>(v.bias + at + j * L, n);
        for (int k = 0; k < kStrands; ++k) {
          const int64_t from = offset + pixel * v.C + k * step + c + j * L;
          if constexpr (kStrands > 1) {
            prefetch_ahead(y + from);
            if constexpr (kWeighted) prefetch_ahead(g + from);
          }
          const Vec<A> weight = kWeighted ? load_lanes<kPartial>(g + from, n) : one;
          sums[j].add(load_lanes<kPartial>(y + from, n), weight, mean, scale, bias, act);
        }
      }
    for (int i = 0; i < kSums; ++i)
      for (int j = 0; j < kN; ++j) {
        A* const total = out + i * v.M * v.C + c + j * L;
        store_lanes<kPartial>(total, load_lanes<kPartial>(total, n) + sums[j].sums[i], n);
      }
  }
};

// Lanes are pixels: out[i][m][c] for one channel. Summed in blocks, so that no long chain of additions rounds one way.
template <class T, Activation kAct, int kSums, bool kWeighted>
SK_INLINE void pool_row(const Branches<T>& v, int64_t at, const T* y, const T* g, int64_t pixels, Accumulate<T>* out) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  const Act<A, kAct> act{v.slope};
  const Vec<A> mean = splat(v.mean[at]), scale = splat(v.scale[at]), bias = splat(v.bias[at]);
  Vec<A> total[kSums] = {};
  for (int64_t i = 0; i < pixels;) {
    const int64_t end = pixels - i < 64 * L ? pixels : i + 64 * L;
    PooledSums<T, kAct, kSums> sums[2];
    const auto add = [&](int64_t from, int j) {
      prefetch_ahead(y + from);
      if constexpr (kWeighted) prefetch_ahead(g + from);
      sums[j].add(load(y + from), kWeighted ? load(g + from) : splat<A>(1), mean, scale, bias, act);
    };
    for (; i + 2 * L <= end; i += 2 * L) add(i, 0), add(i + L, 1);
    for (; i + L <= end; i += L) add(i, 0);
    if (i < end) sums[0].add(load(y + i, end - i), kWeighted ? load(g + i, end - i) : mask<A>(end - i), mean, scale, bias, act);
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
      const int64_t at = (b * v.HW + start) * v.C;
      each_pixel<A>(PoolChannels<T, kAct, kSums, kWeighted>{v, m, v.y[m] + at, kWeighted ? g + at : nullptr, sums}, v.C, pixels);
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
    // Pairwise: a chain would round the same way at each addition, where the segments' sums are alike.
    at::parallel_for(0, B, grain(segments.per_image * sums * M * C), [&](int64_t first, int64_t last) {
      const int64_t row = sums * M * C;
      for (int64_t b = first; b < last && segments.per_image > 0; ++b) {
        A* const image = part + b * segments.per_image * row;
        for (int64_t step = 1; step < segments.per_image; step *= 2)
          for (int64_t segment = 0; segment + step < segments.per_image; segment += 2 * step) {
            A* const to = image + segment * row;
            for (int64_t c = 0; c < row; ++c) to[c] += to[step * row + c];
          }
        for (int64_t i = 0; i < sums; ++i) std::copy_n(image + i * M * C, M * C, out[i].data_ptr<A>() + b * M * C);
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
