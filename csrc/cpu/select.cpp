// select: the weighted sum of the activated branches, v = sum_m a_m act(z_m), and its backward.

#ifdef SK_ISA

// kN vectors, or the first n lanes of each, `step` elements apart.
template <bool kPartial, class T, int kN>
SK_INLINE void put(bool streamed, T* out, int64_t step, const Vec<Accumulate<T>> (&v)[kN], int64_t n) {
  if constexpr (kPartial)
    for (int j = 0; j < kN; ++j) store(out + j * step, v[j], n);
  else store_all(streamed && are_lines(out, step), out, step, v);
}

// A tile is kN vectors, `step` elements apart, from `offset` on; all of image b, and of channel c on if lanes are
// channels, of channel c only if they are pixels. The constants of a branch serve kN vectors.
template <class T, Activation kAct> struct Select {
  using A = Accumulate<T>;
  const Branches<T>& v;
  const A* a;
  T* out;
  bool streamed;

  template <bool kChannelsLast, int kN, bool kPartial>
  SK_INLINE void tile(int64_t b, int64_t c, int64_t offset, int64_t step, int64_t n) const {
    const Act<A, kAct> act{v.slope};
    Vec<A> total[kN] = {};
    for (int64_t m = 0; m < v.M; ++m) {
      const int64_t at = m * v.C + c;
      const Vec<A> mean = constant<kChannelsLast, kPartial>(v.mean + at, n);
      const Vec<A> scale = constant<kChannelsLast, kPartial>(v.scale + at, n);
      const Vec<A> bias = constant<kChannelsLast, kPartial>(v.bias + at, n);
      const Vec<A> weight = constant<kChannelsLast, kPartial>(a + b * v.M * v.C + at, n);
      for (int j = 0; j < kN; ++j) {
        if constexpr (kN > 1) prefetch_ahead(v.y[m] + offset + j * step);
        const Vec<A> y = load_lanes<kPartial>(v.y[m] + offset + j * step, n);
        total[j] += weight * act((y - mean) * scale + bias);
      }
    }
    put<kPartial>(streamed, out + offset, step, total, n);
  }
};

// dy = scale act'(z) (a g + t) - p - (y - mean) q: the gradient through the sum and the squeeze (t), then through the
// batch-norm (p and q carry its two sums; both 0 if it used running statistics).
template <class T, Activation kAct> struct SelectBackward {
  using A = Accumulate<T>;
  const Branches<T>& v;
  const T* g;
  const A *a, *t, *p, *q;
  T* const* dy;
  bool streamed;

  template <bool kChannelsLast, int kN, bool kPartial>
  SK_INLINE void tile(int64_t b, int64_t c, int64_t offset, int64_t step, int64_t n) const {
    const Act<A, kAct> act{v.slope};
    const Vec<A> squeezed = constant<kChannelsLast, kPartial>(t + b * v.C + c, n);
    Vec<A> gradient[kN];
    for (int j = 0; j < kN; ++j) {
      if constexpr (kN > 1) prefetch_ahead(g + offset + j * step);
      gradient[j] = load_lanes<kPartial>(g + offset + j * step, n);
    }
    for (int64_t m = 0; m < v.M; ++m) {
      const int64_t at = m * v.C + c;
      const Vec<A> mean = constant<kChannelsLast, kPartial>(v.mean + at, n);
      const Vec<A> scale = constant<kChannelsLast, kPartial>(v.scale + at, n);
      const Vec<A> bias = constant<kChannelsLast, kPartial>(v.bias + at, n);
      const Vec<A> weight = constant<kChannelsLast, kPartial>(a + b * v.M * v.C + at, n);
      const Vec<A> constant_part = constant<kChannelsLast, kPartial>(p + at, n);
      const Vec<A> linear_part = constant<kChannelsLast, kPartial>(q + at, n);
      Vec<A> result[kN];
      for (int j = 0; j < kN; ++j) {
        if constexpr (kN > 1) prefetch_ahead(v.y[m] + offset + j * step);
        const Vec<A> d = load_lanes<kPartial>(v.y[m] + offset + j * step, n) - mean;
        const Vec<A> dz = act.gate(d * scale + bias, weight * gradient[j] + squeezed);
        result[j] = scale * dz - constant_part - d * linear_part;
      }
      put<kPartial>(streamed, dy[m] + offset, step, result, n);
    }
  }
};

// Every element once: rows (b, c) of pixels [first, last), or, in channels_last, pixels of all images [first, last).
template <class T, class Kernel> SK_INLINE void each_tile(const Branches<T>& v, const Kernel& kernel, int64_t first, int64_t last) {
  constexpr int64_t L = kLanes<Accumulate<T>>;
  if (!v.channels_last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t b = row / v.C, c = row % v.C, offset = row * v.HW;
      int64_t i = 0;
      for (; i + 4 * L <= v.HW; i += 4 * L) kernel.template tile<false, 4, false>(b, c, offset + i, L, 0);
      for (; i + L <= v.HW; i += L) kernel.template tile<false, 1, false>(b, c, offset + i, L, 0);
      if (i < v.HW) kernel.template tile<false, 1, true>(b, c, offset + i, L, v.HW - i);
    }
    return;
  }
  for (int64_t pixel = first; pixel < last;) {
    const int64_t b = pixel / v.HW, image_end = (b + 1) * v.HW, end = image_end < last ? image_end : last;
    constexpr int64_t kN = 4;
    const int64_t strand = (end - pixel) / kN;
    for (const int64_t strand_end = pixel + strand; pixel < strand_end; ++pixel) {
      int64_t c = 0;
      for (; c + L <= v.C; c += L) kernel.template tile<true, kN, false>(b, c, pixel * v.C + c, strand * v.C, 0);
      if (c < v.C) kernel.template tile<true, kN, true>(b, c, pixel * v.C + c, strand * v.C, v.C - c);
    }
    pixel += (kN - 1) * strand;
    for (; pixel < end; ++pixel) {
      int64_t c = 0;
      for (; c + L <= v.C; c += L) kernel.template tile<true, 1, false>(b, c, pixel * v.C + c, v.C, 0);
      if (c < v.C) kernel.template tile<true, 1, true>(b, c, pixel * v.C + c, v.C, v.C - c);
    }
  }
}

template <class T, Activation kAct>
void select_range(const Branches<T>& v, const Accumulate<T>* a, T* out, bool streamed, int64_t first, int64_t last) {
  each_tile(v, Select<T, kAct>{v, a, out, streamed}, first, last);
}

template <class T, Activation kAct>
void select_backward_range(const Branches<T>& v, const T* g, const Accumulate<T>* a, const Accumulate<T>* t, const Accumulate<T>* p,
                           const Accumulate<T>* q, T* const* dy, bool streamed, int64_t first, int64_t last) {
  each_tile(v, SelectBackward<T, kAct>{v, g, a, t, p, q, dy, streamed}, first, last);
}

#else

#include "common.h"
#include "operators.h"

#define SK_KERNELS "select.cpp"
#include "foreach_isa.h"

namespace sk {

// each_tile's ranges: rows of HW pixels, or pixels of C channels.
template <class T, class F> static void parallel_tiles(const Branches<T>& v, const F& f) {
  const int64_t ranges = v.B * (v.channels_last ? v.HW : v.C), values = v.M * (v.channels_last ? v.C : v.HW);
  at::parallel_for(0, ranges, grain(values), [&](int64_t first, int64_t last) {
    f(first, last);
    fence_streams();
  });
}

Tensor select_cpu(TensorList ys, const Tensor& mean, const Tensor& scale, const Tensor& bias, const Tensor& a, c10::string_view activation,
                  double negative_slope) {
  check_normalized(ys, mean, scale, bias);
  const int64_t M = ys.size(), B = ys[0].size(0), C = ys[0].size(1);
  check_array(a, "a", mean.scalar_type(), {B, M, C});
  Tensor out = at::empty_like(ys[0], layout(ys[0]));
  dispatch(ys[0].scalar_type(), activation, [&]<class T, Activation kAct>() {
    using A = Accumulate<T>;
    const Branches<T> v(ys, mean, scale, bias, negative_slope);
    const A* const weights = a.const_data_ptr<A>();
    T* const values = out.data_ptr<T>();
    const bool streamed = beyond_caches(out.nbytes());
    const auto kernel = SK_PICK(select_range<T, kAct>);
    parallel_tiles(v, [&](int64_t first, int64_t last) { kernel(v, weights, values, streamed, first, last); });
  });
  return out;
}

std::vector<Tensor> select_backward_cpu(const Tensor& g, TensorList ys, const Tensor& mean, const Tensor& scale, const Tensor& bias,
                                        const Tensor& a, const Tensor& t, const Tensor& p, const Tensor& q, c10::string_view activation,
                                        double negative_slope) {
  check_select_backward(g, ys, mean, scale, bias, a, t, p, q);
  std::vector<Tensor> dys;
  for (const auto& y : ys) dys.push_back(at::empty_like(y, layout(y)));
  dispatch(ys[0].scalar_type(), activation, [&]<class T, Activation kAct>() {
    using A = Accumulate<T>;
    const Branches<T> v(ys, mean, scale, bias, negative_slope);
    c10::SmallVector<T*, 4> dy;
    for (const auto& d : dys) dy.push_back(d.data_ptr<T>());
    const bool streamed = beyond_caches(v.M * dys[0].nbytes());
    const auto kernel = SK_PICK(select_backward_range<T, kAct>);
    parallel_tiles(v, [&](int64_t first, int64_t last) {
      kernel(v, g.const_data_ptr<T>(), a.const_data_ptr<A>(), t.const_data_ptr<A>(), p.const_data_ptr<A>(), q.const_data_ptr<A>(),
             dy.data(), streamed, first, last);
    });
  });
  return dys;
}

}  // namespace sk

#endif
