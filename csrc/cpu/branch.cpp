// branch: the batch statistics of every branch's batch-norm.

#ifdef SK_ISA

// A first look at a segment gives its mean, as well as a sum in its precision can; a second look, at the deviations from
// that mean, what it missed, and the sum of squares: right also when |mean| >> std. The second look finds the segment in
// cache.

// Lanes are channels: adds kN pixels to sum (C); in the second look the deviations from mean, and to squares (C) their squares.
template <class T, bool kSecondLook, int kN>
SK_INLINE void add_pixels(const T* y, const Accumulate<T>* mean, int64_t C, Accumulate<T>* sum, Accumulate<T>* squares) {
  using A = Accumulate<T>;
  int64_t c = 0;
  for (; c + kLanes<A> <= C; c += kLanes<A>) {
    if constexpr (kN > 1 && !kSecondLook) prefetch_next_pixels<kN>(y + c, C, c);
    const Vec<A> centre = kSecondLook ? load(mean + c) : Vec<A>{};
    Vec<A> total = {}, total_squares = {};
    for (int j = 0; j < kN; ++j) {
      const Vec<A> d = load(y + j * C + c) - centre;
      total += d;
      if constexpr (kSecondLook) total_squares += d * d;
    }
    store(sum + c, load(sum + c) + total);
    if constexpr (kSecondLook) store(squares + c, load(squares + c) + total_squares);
  }
  for (; c < C; ++c)
    for (int j = 0; j < kN; ++j) {
      const A d = static_cast<A>(y[j * C + c]) - (kSecondLook ? mean[c] : A(0));
      sum[c] += d;
      if constexpr (kSecondLook) squares[c] += d * d;
    }
}

template <class T, bool kSecondLook>
SK_INLINE void add_segment(const T* y, const Accumulate<T>* mean, int64_t pixels, int64_t C, Accumulate<T>* sum, Accumulate<T>* squares) {
  constexpr int64_t kN = kPixelsAtOnce;
  for (int64_t c = 0; c < C; ++c) sum[c] = 0;
  if constexpr (kSecondLook)
    for (int64_t c = 0; c < C; ++c) squares[c] = 0;
  int64_t pixel = 0;
  for (; pixel + kN <= pixels; pixel += kN) add_pixels<T, kSecondLook, kN>(y + pixel * C, mean, C, sum, squares);
  for (; pixel < pixels; ++pixel) add_pixels<T, kSecondLook, 1>(y + pixel * C, mean, C, sum, squares);
}

// Lanes are pixels: the sum over a row of y; in the second look of the deviations from mean, and of their squares.
template <class T, bool kSecondLook>
SK_INLINE Accumulate<T> sum_row(const T* y, Accumulate<T> mean, int64_t pixels, Accumulate<T>* squares) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  Vec<A> total[4] = {}, total_squares[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= pixels; i += 4 * L)
    for (int j = 0; j < 4; ++j) {
      const Vec<A> d = load(y + i + j * L) - mean;
      total[j] += d;
      if constexpr (kSecondLook) total_squares[j] += d * d;
    }
  for (; i < pixels; i += L) {
    const Vec<A> d = i + L <= pixels ? load(y + i) - mean : (load<T>(y + i, pixels - i) - mean) * mask<A>(pixels - i);
    total[0] += d;
    if constexpr (kSecondLook) total_squares[0] += d * d;
  }
  if constexpr (kSecondLook) *squares = sum<A>((total_squares[0] + total_squares[1]) + (total_squares[2] + total_squares[3]));
  return sum<A>((total[0] + total[1]) + (total[2] + total[3]));
}

// moments: (B, S, 2, M, C), of every segment its mean and the sum of the squares of the deviations from it; missed: (B, S,
// M, C), the sum of these deviations. A task is a segment where lanes are channels, one channel of a segment where they
// are pixels.
template <class T>
void branch_statistics_tasks(const Branches<T>& v, const Segments& segments, Accumulate<T>* moments, Accumulate<T>* missed, int64_t first,
                             int64_t last) {
  using A = Accumulate<T>;
  const int64_t channels = v.channels_last ? 1 : v.C;
  for (int64_t task = first; task < last; ++task) {
    const int64_t segment = task / channels, b = segment / segments.per_image;
    const int64_t start = segment % segments.per_image * segments.pixels;
    const int64_t pixels = v.HW - start < segments.pixels ? v.HW - start : segments.pixels;
    for (int64_t m = 0; m < v.M; ++m) {
      A *const mean = moments + (segment * 2 * v.M + m) * v.C, *const squares = mean + v.M * v.C;
      A* const sum = missed + (segment * v.M + m) * v.C;
      if (!v.channels_last) {
        const int64_t c = task % channels;
        const T* const row = v.y[m] + (b * v.C + c) * v.HW + start;
        mean[c] = sum_row<T, false>(row, 0, pixels, nullptr) / static_cast<A>(pixels);
        sum[c] = sum_row<T, true>(row, mean[c], pixels, squares + c);
        continue;
      }
      const T* const y = v.y[m] + (b * v.HW + start) * v.C;
      add_segment<T, false>(y, nullptr, pixels, v.C, mean, nullptr);
      for (int64_t c = 0; c < v.C; ++c) mean[c] /= static_cast<A>(pixels);
      add_segment<T, true>(y, mean, pixels, v.C, sum, squares);
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
static void join(const A* moments, const A* missed, const Segments& segments, int64_t B, int64_t HW, int64_t channels, A* mean, A* var) {
  const int64_t parts = B * segments.per_image;
  const double count = static_cast<double>(B) * HW;
  std::vector<double> average(channels), square(channels);
  const auto pixels = [&](int64_t part) {
    return static_cast<double>(std::min(segments.pixels, HW - part % segments.per_image * segments.pixels));
  };
  // Of a part of n pixels: the mean, to more than A's precision.
  const auto mean_of = [&](int64_t part, double n, int64_t c) { return moments[part * 2 * channels + c] + missed[part * channels + c] / n; };
  for (int64_t part = 0; part < parts; ++part) {
    const double n = pixels(part);
    for (int64_t c = 0; c < channels; ++c) average[c] += n / count * mean_of(part, n, c);
  }
  for (int64_t part = 0; part < parts; ++part) {
    const double n = pixels(part);
    for (int64_t c = 0; c < channels; ++c) {
      const double d = mean_of(part, n, c) - average[c], sum = missed[part * channels + c];
      square[c] += moments[(part * 2 + 1) * channels + c] - sum * (sum / n) + n * d * d;
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
    // Only the deviations from a mean have to be precise here.
    const Segments segments(v.C, v.HW, v.channels_last, 512);
    Tensor moments = at::empty({v.B * segments.per_image, 2, M, C}, options), missed = at::empty({v.B * segments.per_image, M, C}, options);
    A *const out = moments.data_ptr<A>(), *const missed_out = missed.data_ptr<A>();
    const auto kernel = SK_PICK(branch_statistics_tasks<T>);
    const int64_t channels = v.channels_last ? 1 : C;
    at::parallel_for(0, v.B * segments.per_image * channels, grain(v.M * std::min(v.HW, segments.pixels) * C / channels),
                     [&](int64_t first, int64_t last) { kernel(v, segments, out, missed_out, first, last); });
    join<A>(out, missed_out, segments, v.B, v.HW, M * C, mean.data_ptr<A>(), var.data_ptr<A>());
  });
  return {mean, var};
}

}  // namespace sk

#endif
