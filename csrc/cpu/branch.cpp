// branch: the batch statistics of every branch's batch-norm.

#ifdef SK_ISA

// Mean and sum of squared deviations of a column: kU neighbouring vectors, `count` of them `step` apart. The second look
// at the data, with the mean known, is what keeps a variance right when |mean| >> std; it finds the data in cache.
template <class T, int kU, bool kPartial>
SK_INLINE void add_columns(const T* y, int64_t count, int64_t step, int64_t n, Vec<Accumulate<T>> (&total)[kU]) {
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < kU; ++j) total[j] += load_lanes<kPartial>(y + i * step + j * kLanes<Accumulate<T>>, n);
}

template <class T, int kU, bool kPartial>
SK_INLINE void add_squares(const T* y, int64_t count, int64_t step, int64_t n, const Vec<Accumulate<T>> (&mean)[kU],
                           Vec<Accumulate<T>> (&total)[kU]) {
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < kU; ++j) {
      const Vec<Accumulate<T>> d = load_lanes<kPartial>(y + i * step + j * kLanes<Accumulate<T>>, n) - mean[j];
      total[j] += d * d;
    }
}

// Lanes are channels.
template <class T, int kU, bool kPartial>
SK_INLINE void channel_moments(const T* y, int64_t pixels, int64_t C, int64_t n, Accumulate<T>* mean, Accumulate<T>* squares) {
  using A = Accumulate<T>;
  Vec<A> average[kU] = {}, square[kU] = {};
  add_columns<T, kU, kPartial>(y, pixels, C, n, average);
  for (int j = 0; j < kU; ++j) average[j] /= A(pixels);
  add_squares<T, kU, kPartial>(y, pixels, C, n, average, square);
  for (int j = 0; j < kU; ++j) {
    store_lanes<kPartial>(mean + j * kLanes<A>, average[j], n);
    store_lanes<kPartial>(squares + j * kLanes<A>, square[j], n);
  }
}

// Lanes are pixels.
template <class T>
SK_INLINE void row_moments(const T* y, int64_t pixels, Accumulate<T>* mean, Accumulate<T>* squares) {
  using A = Accumulate<T>;
  constexpr int kU = 4;
  const int64_t blocks = pixels / (kU * kLanes<A>), vectors = pixels / kLanes<A> - blocks * kU, n = pixels % kLanes<A>;
  const T* const rest = y + blocks * kU * kLanes<A>;
  const T* const tail = rest + vectors * kLanes<A>;
  Vec<A> total[kU] = {}, first[1] = {};
  add_columns<T, kU, false>(y, blocks, kU * kLanes<A>, 0, total);
  add_columns<T, 1, false>(rest, vectors, kLanes<A>, 0, first);
  if (n) first[0] += load<T>(tail, n);
  const A average = sum<A>((total[0] + total[1]) + (total[2] + total[3]) + first[0]) / A(pixels);

  const Vec<A> centre[kU] = {splat<A>(average), splat<A>(average), splat<A>(average), splat<A>(average)};
  const Vec<A> centre_of_one[1] = {centre[0]};
  Vec<A> square[kU] = {}, last[1] = {};
  add_squares<T, kU, false>(y, blocks, kU * kLanes<A>, 0, centre, square);
  add_squares<T, 1, false>(rest, vectors, kLanes<A>, 0, centre_of_one, last);
  if (n) {
    const Vec<A> d = (load<T>(tail, n) - average) * mask<A>(n);
    last[0] += d * d;
  }
  *mean = average;
  *squares = sum<A>((square[0] + square[1]) + (square[2] + square[3]) + last[0]);
}

// moments: (B, S, 2, M, C), the mean and the sum of squared deviations of every segment. A task is a segment where lanes
// are channels, one channel of a segment where they are pixels.
template <class T>
void branch_statistics_tasks(const Branches<T>& v, const Segments& segments, Accumulate<T>* moments, int64_t first, int64_t last) {
  using A = Accumulate<T>;
  const int64_t channels = v.channels_last ? 1 : v.C;
  for (int64_t task = first; task < last; ++task) {
    const int64_t segment = task / channels, b = segment / segments.per_image;
    const int64_t start = segment % segments.per_image * segments.pixels;
    const int64_t pixels = v.HW - start < segments.pixels ? v.HW - start : segments.pixels;
    for (int64_t m = 0; m < v.M; ++m) {
      A* const mean = moments + (segment * 2 * v.M + m) * v.C;
      A* const squares = mean + v.M * v.C;
      if (!v.channels_last) {
        const int64_t c = task % channels;
        row_moments(v.y[m] + (b * v.C + c) * v.HW + start, pixels, mean + c, squares + c);
        continue;
      }
      const T* const y = v.y[m] + (b * v.HW + start) * v.C;
      int64_t c = 0;
      for (; c + 4 * kLanes<A> <= v.C; c += 4 * kLanes<A>) channel_moments<T, 4, false>(y + c, pixels, v.C, 0, mean + c, squares + c);
      for (; c + kLanes<A> <= v.C; c += kLanes<A>) channel_moments<T, 1, false>(y + c, pixels, v.C, 0, mean + c, squares + c);
      if (c < v.C) channel_moments<T, 1, true>(y + c, pixels, v.C, v.C - c, mean + c, squares + c);
    }
  }
}

#else

#include "common.h"
#include "operators.h"

#define SK_KERNELS "branch.cpp"
#include "foreach_isa.h"

namespace sk {

// The moments of all segments joined (Chan, Golub, LeVeque 1979, formula 2.1, for many parts at once).
template <class A>
static void join(const A* moments, const Segments& segments, int64_t B, int64_t HW, int64_t channels, A* mean, A* var) {
  const int64_t parts = B * segments.per_image;
  const double count = static_cast<double>(B) * HW;
  std::vector<double> average(channels), square(channels);
  const auto pixels = [&](int64_t part) {
    return static_cast<double>(std::min(segments.pixels, HW - part % segments.per_image * segments.pixels));
  };
  for (int64_t part = 0; part < parts; ++part) {
    const A* const part_mean = moments + part * 2 * channels;
    const double share = pixels(part) / count;
    for (int64_t c = 0; c < channels; ++c) average[c] += share * part_mean[c];
  }
  for (int64_t part = 0; part < parts; ++part) {
    const A* const part_mean = moments + part * 2 * channels;
    const double n = pixels(part);
    for (int64_t c = 0; c < channels; ++c) {
      const double d = part_mean[c] - average[c];
      square[c] += part_mean[channels + c] + n * d * d;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = static_cast<A>(average[c]);
    var[c] = static_cast<A>(square[c] / count);
  }
}

std::tuple<Tensor, Tensor> branch_statistics_cpu(TensorList ys) {
  check_branches(ys);
  TORCH_CHECK_VALUE(ys[0].numel() > 0, "ys: expected at least one value per channel, got shape ", ys[0].sizes());
  const auto options = ys[0].options().dtype(accumulate_type(ys[0].scalar_type()));
  const int64_t M = ys.size(), C = ys[0].size(1);
  Tensor mean = at::empty({M, C}, options), var = at::empty({M, C}, options);
  dispatch(ys[0].scalar_type(), [&]<class T>() {
    using A = Accumulate<T>;
    const Branches<T> v(ys);
    const Segments segments(v.C, v.HW, v.channels_last);
    Tensor moments = at::empty({v.B * segments.per_image, 2, M, C}, options);
    A* const out = moments.data_ptr<A>();
    const auto kernel = SK_PICK(branch_statistics_tasks<T>);
    const int64_t channels = v.channels_last ? 1 : C;
    at::parallel_for(0, v.B * segments.per_image * channels, grain(v.M * std::min(v.HW, segments.pixels) * C / channels),
                     [&](int64_t first, int64_t last) { kernel(v, segments, out, first, last); });
    join<A>(out, segments, v.B, v.HW, M * C, mean.data_ptr<A>(), var.data_ptr<A>());
  });
  return {mean, var};
}

}  // namespace sk

#endif
